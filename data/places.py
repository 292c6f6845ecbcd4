"""Where files lie: in a folder of this machine, or under a prefix of an object store such as s3://bucket/cache.

Both are paths in use: `/`, `exists`, `read_bytes`, `glob`, `unlink`.  What differs is how a file is published, which
`publish` knows, and how one is read in parts.
"""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

from .errors import ConfigError, InstallationError, MediaError

# Media are read in blocks, the last ones of which stay in memory: an index may lie at either end of a file.
BLOCK_BYTES, N_BLOCKS = 2**20, 32


def is_address(text: object) -> bool:
    """Say whether a text names a place in an object store, such as s3://bucket/folder."""
    return "://" in str(text)


def place(where: str | os.PathLike) -> Path:
    """Return a local path, or for an address the path-like object of universal_pathlib.

    Raises InstallationError if what the address needs is not installed, ConfigError if nobody knows its protocol.
    """
    if isinstance(where, Path) or not is_address(where):
        return Path(where)
    if not isinstance(where, str):
        return where
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
    return found


def under(folder: Path, text: str) -> Path:
    """Return a path that starts at `folder`, unless it is absolute or an address."""
    return place(text) if is_address(text) else folder / text


def is_local(path: Path) -> TypeGuard[Path]:
    """Say whether a path is on this machine's file system."""
    return isinstance(path, Path)


def zarr_store(path: Path) -> dict[str, Any]:
    """Return the arguments with which zarr opens what lies at `path`."""
    options = {} if is_local(path) else {"storage_options": dict(path.storage_options)}
    return {"store": str(path), **options}


def exists(path: Path) -> bool:
    """Say whether there is a file or folder."""
    return os.path.exists(path) if is_local(path) else path.exists()  # which, unlike Path's, is at ease with any name


def is_folder(path: Path) -> bool:
    """Say whether a path is a folder."""
    return os.path.isdir(path) if is_local(path) else path.is_dir()


def sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, by its path from there; none if there is no folder."""
    if is_local(folder):
        files = (Path(top) / name for top, _, names in os.walk(folder) for name in names)
        found = {}
        for file in files:
            with suppress(FileNotFoundError):  # somebody works there
                found[file.relative_to(folder).as_posix()] = file.stat().st_size
        return found
    top = folder.path.rstrip("/")
    found = folder.fs.find(top, detail=True)  # one request for a thousand files
    return {name.removeprefix(top).lstrip("/"): about["size"] for name, about in found.items()}


def read_bytes(path: Path) -> bytes:
    """Return a whole file, by one request; raises what `storage_errors` names."""
    return path.read_bytes() if is_local(path) else path.fs.cat_file(path.path)


def names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none if there is no folder."""
    try:
        if is_local(folder):
            return sorted(os.listdir(folder))
        return sorted(name.rstrip("/").rpartition("/")[2] for name in folder.fs.ls(folder.path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def storage_errors() -> tuple[type[Exception], ...]:
    """Return what reading and writing may raise: OSError, and what the libraries in use for object stores add to it."""
    known = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))
    return (OSError, *(getattr(sys.modules[module], name) for module, name in known if module in sys.modules))


class StoredFile(io.RawIOBase):
    """A file of an object store that is read where a library asks for it; raises MediaError where that fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        cache = {"cache_type": "blockcache", "cache_options": {"maxblocks": N_BLOCKS}}
        try:
            self._file = path.fs.open(path.path, "rb", block_size=BLOCK_BYTES, **cache)
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
