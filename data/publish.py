"""Files that appear whole or not at all: written under a temporary name, synced, then renamed."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CacheError

# Which machine's process numbers a temporary name holds; several machines may share the folder.
MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a line that names the file and the next step."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(
            f"{path}: cannot be written: {error.strerror}. Free space there, or choose a folder that can be written."
        ) from error


def _temporary(path: Path) -> Path:
    """Return the name beside `path` under which this process writes: whose it is can be told from it."""
    return path.with_name(f".{path.name}.{MACHINE}-{os.getpid()}.tmp")


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that were killed left half written, anywhere in `folder`."""
    for left in folder.rglob(f".*.{MACHINE}-*.tmp"):
        pid = left.name.removesuffix(".tmp").rpartition("-")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def publish(path: Path, data: bytes | memoryview) -> None:
    """Write `data` so that `path` never holds a part of it, even if the machine stops at any instant.

    Raises CacheError if the disk is full or read-only; the file that was there before is then untouched.
    """
    temporary = _temporary(path)
    with _blaming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def publish_json(path: Path, value: Any) -> None:
    """Publish a JSON value, readable by people."""
    publish(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def publish_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a whole folder under a temporary name, then give it its own; an existing one is replaced."""
    temporary = _temporary(path)
    with _blaming(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; raise CacheError if it is damaged, FileNotFoundError if it is not there."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CacheError(f"{path}: damaged, not JSON ({error}). Delete it and run the command that made it.") from None
