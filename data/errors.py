"""Every error that is the user's to mend; each message says what, where, expected, found, and the next step."""

from collections.abc import Iterable
from difflib import get_close_matches

# A message that quotes a name of 10,000 characters is cut in its middle: its beginning and its end say what to do.
LONGEST, CUT = 2000, " ... "


def printable(text: str) -> str:
    """Return text as one line that a terminal shows and does not obey: what cannot be printed is escaped."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()


class KarmmaError(Exception):
    """Base of all errors that the command line shows as one line, without a traceback."""

    def __init__(self, message: str) -> None:
        line, half = printable(message), (LONGEST - len(CUT)) // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]}{CUT}{line[-half:]}")


class ConfigError(KarmmaError, ValueError):
    """A preset, option, TOML field or value that does not exist or does not fit."""


class TableError(KarmmaError, ValueError):
    """A clip table that cannot be used as it stands."""


class MediaError(KarmmaError, OSError):
    """A media file that cannot be read; it makes one modality of one clip `failed`."""


class InstallationError(KarmmaError, ImportError):
    """A library that is missing or broken: the environment is at fault, not the files."""


class CacheError(KarmmaError, OSError):
    """A cache that is damaged, read-only or missing what was asked for."""


class StaleCacheError(CacheError):
    """A cache made under other settings than the ones asked for."""


class IncompleteCacheError(CacheError, LookupError):
    """A cache with rows that were never written, or that failed."""


class MemoryShortError(KarmmaError, MemoryError):
    """More memory was needed than the machine or the GPU has."""


class ClusterError(KarmmaError, ConnectionError):
    """A Dask cluster that cannot be reached, or was lost."""


class RunError(KarmmaError):
    """A run folder that is missing, unfinished or made for something else."""


class ExportError(KarmmaError, RuntimeError):
    """A model that cannot be exported, or whose export does not answer as the model does."""


# What libraries say, in errors of any class, where memory is short: the allocators of torch, oneDNN, and threads that
# get no stack.
SHORT = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a primitive",
    "can't start new thread",
    "launch worker thread",
)


def is_memory_short(error: Exception) -> bool:
    """Say whether an error of a library means that memory ran out."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in SHORT)


def memory_short(error: Exception, what: str, advice: str) -> MemoryShortError:
    """Return the error of ours that stands for one of `is_memory_short`."""
    reason = str(error).partition("\n")[0].rstrip(".") or "allocation failed"
    return MemoryShortError(f"Out of memory{what}: {reason}. {advice}")


def cause(error: Exception) -> str:
    """Return what an error of FFmpeg, or of the system, says."""
    return getattr(error, "strerror", None) or str(error)


def one_line(error: Exception) -> str:
    """Return what an error says, without its line breaks."""
    return " ".join(str(error).split())


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error line: the nearest known name, or all of them."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
