"""Where files lie: in a folder of this machine, or under a prefix of an object store such as s3://bucket/cache.

Both are paths in use: `/`, `exists`, `read_bytes`, `glob`, `unlink`.  What differs is how a file is published, which
`publish` knows, and how one is read in parts.
"""

import glob
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from .errors import ConfigError, InstallationError, MediaError

if TYPE_CHECKING:
    from upath import UPath

# Media are read in blocks, the last ones of which stay in memory: an index may lie at either end of a file.
BLOCK_BYTES, N_BLOCKS = 2**20, 32


def is_address(text: object) -> bool:
    """Say whether a text names a place in an object store, such as s3://bucket/folder."""
    return "://" in str(text)


def place(where: str | os.PathLike[str]) -> Path:
    """Return a local path, or for an address the path-like object of universal_pathlib.

    Raises InstallationError if what the address needs is not installed, ConfigError if nobody knows its protocol.
    """
    if isinstance(where, Path) or not is_address(where):
        return Path(where)
    if not isinstance(where, str):
        return cast(Path, where)  # has been here before
    protocol = where.partition("://")[0]
    try:
        from upath import UPath

        # Other machines write there too: a listing of a minute ago is not good enough.
        found = UPath(where.rstrip("/"), use_listings_cache=False)
        found.fs  # noqa: B018  only now is the protocol's own package loaded
    except ImportError as error:
        raise InstallationError(f"{where}: {error}. Install what it needs: pip install 'karmma[{protocol}]'.") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}. Use a folder, s3:// or gs://.") from None
    return cast(Path, found)  # which it is in all that we do with it; `remote` for the rest


def under(folder: Path, text: str) -> Path:
    """Return a path that starts at `folder`, unless it is absolute or an address."""
    return place(text) if is_address(text) else folder / text


def is_local(path: Path) -> TypeGuard[Path]:
    """Say whether a path is on this machine's file system."""
    return isinstance(path, Path)


def remote(path: Path) -> "UPath":
    """Return a path that is not local as what it is: with a file system `fs`, and a `path` in there."""
    return cast("UPath", path)


def zarr_store(path: Path) -> dict[str, Any]:
    """Return the arguments with which zarr opens what lies at `path`."""
    options = {} if is_local(path) else {"storage_options": dict(remote(path).storage_options)}
    return {"store": str(path), **options}


def exists(path: Path) -> bool:
    """Say whether there is a file or folder."""
    return os.path.exists(path) if is_local(path) else path.exists()  # which, unlike Path's, is at ease with any name


def is_folder(path: Path) -> bool:
    """Say whether a path is a folder."""
    return os.path.isdir(path) if is_local(path) else path.is_dir()


def matches(path: Path) -> list[Path]:
    """Return the files and folders that a path with `*` stands for, sorted; `*` is any part of one name."""
    pattern = "*".join(map(glob.escape, str(path).split("*")))
    if is_local(path):
        return [Path(found) for found in sorted(glob.glob(pattern))]
    files = remote(path).fs
    return [place(files.unstrip_protocol(found)) for found in sorted(files.glob(pattern))]


def located(path: Path) -> Path:
    """Return the one file or folder that a path with `*` stands for; unless there is exactly one, the path as it is."""
    file, inside, name = str(path).partition("::")
    found = matches(place(file)) if "*" in file else []
    return place(f"{found[0]}{inside}{name}") if len(found) == 1 else path


def sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, by its path from there; none if there is no folder."""
    if is_local(folder):
        files = (Path(top) / name for top, _, names in os.walk(folder) for name in names)
        found = {}
        for file in files:
            with suppress(FileNotFoundError):  # somebody works there
                found[file.relative_to(folder).as_posix()] = file.stat().st_size
        return found
    top = remote(folder).path.rstrip("/")
    listed = remote(folder).fs.find(top, detail=True)  # one request for a thousand files
    return {name.removeprefix(top).lstrip("/"): about["size"] for name, about in listed.items()}


def read_bytes(path: Path) -> bytes:
    """Return a whole file, by one request; raises what `storage_errors` names."""
    return path.read_bytes() if is_local(path) else remote(path).fs.cat_file(remote(path).path)


def names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none if there is no folder."""
    try:
        if is_local(folder):
            return sorted(os.listdir(folder))
        listed = remote(folder).fs.ls(remote(folder).path, detail=False)
        return sorted(name.rstrip("/").rpartition("/")[2] for name in listed)
    except (FileNotFoundError, NotADirectoryError):
        return []


def storage_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return what reading and writing may raise: OSError, what libraries in use for object stores add to it, `more`."""
    known = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))
    return (OSError, *more, *(getattr(sys.modules[module], name) for module, name in known if module in sys.modules))


class StoredFile(io.RawIOBase):
    """A file of an object store that is read where a library asks for it; raises MediaError where that fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        cache = {"cache_type": "blockcache", "cache_options": {"maxblocks": N_BLOCKS}}
        try:
            self._file = remote(path).fs.open(remote(path).path, "rb", block_size=BLOCK_BYTES, **cache)
        except FileNotFoundError:
            raise MediaError(f"{path}: no such file. Put it there, or correct the clip table.") from None
        except storage_errors() as error:
            raise MediaError(f"{path}: cannot be opened: {error}. Give the command again.") from None

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position; return it."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes; return the number of bytes."""
        try:
            return self._file.readinto(buffer)
        except storage_errors() as error:
            raise MediaError(f"{self.path}: cannot be read: {error}. Give the command again.") from None

    def close(self) -> None:
        """Forget the blocks."""
        if not self.closed:
            self._file.close()
        super().close()
