"""The reader process: reads what `ReaderPool` asks for over a pipe, so that a codec that crashes ends it alone.

A message, either way, is the length of a JSON text (4 bytes, little-endian), the text, and the bytes of the arrays
that it announces.  The first one asked is {data, patience_s}, the first answer says that the libraries load; from then
on {clips, views, modalities} is answered by {readings}, {missing: a library}, {refused: a setting} or
{bug: a traceback}.
"""

import json
import os
import signal
import struct
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from io import FileIO
from typing import Any, TypeVar

import numpy as np

from .annotations import Clip
from .config import DataConfig
from .errors import ConfigError, one_line
from .media import Reading
from .places import place
from .views import draw_view

# What every clip needs: without them no reader starts.
LIBRARIES = ("av", "cv2")
LENGTH = struct.Struct("<I")
# Bytes that a reader may hold.  A clip takes some hundred MB, with RAFT at full HD some GB; what wants more is damaged.
MOST_MEMORY = 8 * 2**30

Bytes = TypeVar("Bytes", bytearray, np.ndarray)


def send(pipe: FileIO, header: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write a message; raises BrokenPipeError if nobody is there to read it."""
    text = json.dumps(header).encode()
    parts: list[bytes | np.ndarray] = [LENGTH.pack(len(text)) + text]
    for part in (*parts, *(array.ravel().view(np.uint8) for array in arrays)):
        rest = memoryview(part)
        while rest:
            rest = rest[pipe.write(rest) :]


def receive(pipe: FileIO) -> dict[str, Any]:
    """Read the header of a message; raises EOFError if the other side is gone."""
    (size,) = LENGTH.unpack(fill(pipe, bytearray(LENGTH.size)))
    return json.loads(fill(pipe, bytearray(size)))


def fill(pipe: FileIO, buffer: Bytes) -> Bytes:
    """Read one-dimensional bytes to the end of `buffer`; raises EOFError if they end before it does."""
    rest = memoryview(buffer)
    while rest:
        n_read = pipe.readinto(rest)
        if not n_read:
            raise EOFError
        rest = rest[n_read:]
    return buffer


def _bound_memory() -> None:
    """Have allocations beyond `MOST_MEMORY` fail in this process, where the system can do that."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        bound = MOST_MEMORY if most == resource.RLIM_INFINITY else min(MOST_MEMORY, most)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, most))


def serve() -> None:
    """Answer requests from standard input until it ends."""
    _bound_memory()
    asked, answers = FileIO(os.dup(0)), FileIO(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        first = receive(asked)
        answer = _refusal_of_libraries()
        send(answers, answer)
        if answer:
            return
        data = DataConfig.model_validate(first["data"])
        while True:
            request = receive(asked)
            # Ends the process in the midst of a library's code too, and even if the parent is gone by then.
            # A further clip adds a quarter: most need far less, and one that hangs should not hold up its group.
            signal.setitimer(signal.ITIMER_REAL, first["patience_s"] * (3 + len(request["clips"])) / 4)
            answer, arrays = _answer(request, data)
            signal.setitimer(signal.ITIMER_REAL, 0)
            send(answers, answer, arrays)
            del arrays
    except (EOFError, BrokenPipeError):
        return


def _refusal_of_libraries() -> dict[str, str]:
    """Return nothing if the libraries load, else why not: an OSError is one that lacks a part of its own."""
    for name in LIBRARIES:
        try:
            import_module(name)
        except (ImportError, OSError) as error:
            return {"missing": _missing(name, error)}
    return {}


def _answer(request: dict[str, Any], data: DataConfig) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return the header of the answer and the arrays that follow it."""
    try:
        from .raw import read_clips

        clips = [_clip(**row) for row in request["clips"]]
        views = [draw_view(clip.clip_id, view, data) for clip, view in zip(clips, request["views"], strict=True)]
        found = read_clips(clips, views, [tuple(names) for names in request["modalities"]], data)
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)  # just as the system would: a matter of the clip, and of nothing else
    except ConfigError as error:  # such as weights that are none
        return {"refused": str(error)}, []
    except Exception as error:  # a bug: the parent raises it
        own = (__package__ or "").partition(".")[0]
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] != own:
            return {"missing": _missing(error.name or "that a modality needs", error)}, []
        return {"bug": traceback.format_exc()}, []
    arrays = [reading.array for readings in found for reading in readings.values() if reading.array is not None]
    return {"readings": [[_row(*item) for item in readings.items()] for readings in found]}, arrays


def _row(name: str, reading: Reading) -> tuple[Any, ...]:
    array = reading.array
    form = ("", ()) if array is None else (array.dtype.str, array.shape)
    return name, int(reading.state), reading.reason, *form


def _clip(video: str, sources: dict[str, str | None], **rest: Any) -> Clip:
    files = {name: place(path) if path else None for name, path in sources.items()}
    return Clip(video=place(video), sources=files, **rest)


def _missing(name: str, error: Exception) -> str:
    return f"The library {name} cannot be loaded ({one_line(error)}). Install it anew into {sys.prefix}."


if __name__ == "__main__":
    serve()
