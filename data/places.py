"""Where the files of a cache lie: a folder of this machine, or a prefix of an object store such as s3://bucket/cache.

Both are paths in use: `/`, `exists`, `read_bytes`, `glob`, `unlink`.  What differs is how a file is published, which
`publish` knows, and that only local files are read by position.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from .errors import ConfigError, InstallationError

if TYPE_CHECKING:
    pass


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


def is_local(path: Path) -> TypeGuard[Path]:
    """Say whether a path is on this machine's file system."""
    return isinstance(path, Path)


def zarr_store(path: Path) -> dict[str, Any]:
    """Return the arguments with which zarr opens what lies at `path`."""
    options = {} if is_local(path) else {"storage_options": dict(path.storage_options)}
    return {"store": str(path), **options}


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


def names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none if there is no folder."""
    try:
        if is_local(folder):
            return sorted(os.listdir(folder))
        return sorted(name.rstrip("/").rpartition("/")[2] for name in folder.fs.ls(folder.path, detail=False))
    except FileNotFoundError:
        return []
