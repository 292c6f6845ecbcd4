"""Files that appear whole or not at all: written under a temporary name, synced, then renamed; or sent by one PUT."""

import fnmatch
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import ENOTDIR, ENOTSUP, EOPNOTSUPP, EPERM
from pathlib import Path
from typing import Any

from .errors import CacheError, KarmmaError, cause
from .places import is_local, read_bytes, remote, storage_errors

# Bytes, or anything that holds bytes, such as an Arrow buffer.
Buffer = bytes | memoryview | Any


def _machine() -> str:
    """Return 8 hex digits for the machine, or the container in it, whose process numbers a name may hold."""
    numbers, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
    kind = os.stat(numbers).st_ino if numbers.exists() else 0
    # Names alone will not do: machines made from one image may share theirs.
    started = boot.read_text().strip() if boot.exists() else ""
    return hashlib.sha256(f"{platform.node()} {kind} {started}".encode()).hexdigest()[:8]


# Several machines may share the folder.
MACHINE = _machine()


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk, or a store that does not answer, into a line with the file and the next step."""
    try:
        yield
    except KarmmaError:  # said already, and perhaps of another file
        raise
    except storage_errors() as error:
        raise CacheError(
            f"{path}: cannot be written: {cause(error)}. Free space there, or choose a folder that can be written."
        ) from error


def _temporary(path: Path) -> Path:
    """Return the name beside `path` under which this process writes: whose it is can be told from it."""
    return path.with_name(f".{path.name}.{MACHINE}-{os.getpid()}.tmp")


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that were killed left half written, anywhere in `folder`."""
    if not is_local(folder):  # a PUT leaves nothing behind
        return
    for top, folders, files in os.walk(folder):  # which, unlike rglob, bears folders that vanish: others are at work
        for name in fnmatch.filter([*folders, *files], f".*.{MACHINE}-*.tmp"):
            pid = name.removesuffix(".tmp").rpartition("-")[2]
            if pid.isdecimal() and not is_running(int(pid)):
                shutil.rmtree(Path(top) / name, ignore_errors=True)
                with suppress(OSError):  # swept by another
                    (Path(top) / name).unlink()


def is_running(pid: int) -> bool:
    """Say whether a process of this machine is there."""
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def publish(path: Path, data: Buffer, durable: bool = True) -> None:
    """Write `data` so that `path` never holds a part of it, even if the machine stops at any instant.

    durable=False: a machine that stops may leave a part, or nothing; for what can be told to be whole, and made again.
    Raises CacheError if the disk is full or read-only; the file that was there before is then untouched.
    """
    with _blaming(path):
        if not is_local(path):
            _put(path, bytes(data))
            return
        with _written(path, data, durable) as temporary:
            os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)


def create(path: Path, data: bytes) -> bool:
    """Write a file unless there is one, as one indivisible step; return whether it was written."""
    with _blaming(path):
        try:
            if not is_local(path):
                _put(path, data, mode="create")
                return True
            with _written(path, data) as temporary:
                _link(temporary, path, data)
        except FileExistsError:
            return False
        except OSError as error:
            # A store refuses a PUT that may only create with HTTP 412, and one of two at once with 409.
            if is_local(path) or not _is_refusal(error):
                raise
            return False
        sync_folder(path.parent)
        return True


def _put(path: Path, data: bytes, **options: str) -> None:
    """Send a file by one PUT, however large: a shard is never there in part."""
    remote(path).fs.pipe_file(remote(path).path, data, chunksize=len(data) + 1, **options)


def _link(temporary: Path, path: Path, data: bytes) -> None:
    """Give a file its name unless another has it."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (EPERM, ENOTSUP, EOPNOTSUPP):
            raise
        with open(path, "xb") as file:  # a file system without hard links, such as exFAT or a share of Windows
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _is_refusal(error: OSError) -> bool:
    answer = getattr(error.__cause__, "response", {})
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412)


@contextmanager
def written_by(path: Path) -> Iterator[Path]:
    """Yield a name under which a library may write a local file that then becomes `path`, synced and whole.

    Raises CacheError if the disk is full or read-only.
    """
    temporary = _temporary(path)
    with _blaming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextmanager
def _written(path: Path, data: Buffer, durable: bool = True) -> Iterator[Path]:
    """Write a file, synced if it is to be durable, beside `path`; it is gone afterwards."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file, which is not to be mistaken for `path` being there
        raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR), str(path.parent)) from None
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def plain(found: Mapping[str, float]) -> dict[str, float | None]:
    """Return the numbers as JSON can hold them: what could not be measured (NaN) becomes None."""
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def publish_json(path: Path, value: Any) -> None:
    """Publish a JSON value, readable by people."""
    publish(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def publish_folder(path: Path, fill: Callable[[Path], object], mark: str = "zarr.json") -> None:
    """Let `fill` write a whole folder under a temporary name, then give it its own; an existing one is replaced.

    In an object store, which knows no folders, the file `mark` is sent last: without it there is no store.
    """
    with _blaming(path):
        if not is_local(path):
            _send_folder(path, fill, mark)
            return
        temporary = _temporary(path)
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


def _send_folder(path: Path, fill: Callable[[Path], object], mark: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder) / "store")
        files = [file for file in (Path(folder) / "store").rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file.relative_to(Path(folder) / "store") == Path(mark)):
            publish(path / file.relative_to(Path(folder) / "store").as_posix(), file.read_bytes())


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there; what marks it as whole goes first."""
    with _blaming(path):
        if not is_local(path):
            with suppress(FileNotFoundError):
                remote(path).fs.rm(remote(path).path, recursive=True)
            return
        if path.is_dir():
            doomed = _temporary(path)  # as one step: half a folder never bears the name
            os.replace(path, doomed)
            shutil.rmtree(doomed)
        else:
            path.unlink(missing_ok=True)


def withdraw(path: Path) -> None:
    """Remove a file, if it is there, so that it stays away even if the machine stops at any instant."""
    with _blaming(path):
        try:
            path.unlink()
        except FileNotFoundError:
            return
        if is_local(path):
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
    return _parsed(path, read_bytes(path))


def _parsed(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CacheError(f"{path}: damaged, not JSON ({error}). Delete it and run the command that made it.") from None


def read_json_files(folder: Path) -> dict[str, Any]:
    """Return by stem the values of all .json files of a folder, None of a damaged one; {} if there is no folder."""
    if is_local(folder):
        texts = {}
        for file in folder.glob("*.json"):
            with suppress(FileNotFoundError):  # superseded just now
                texts[file.name] = file.read_bytes()
    else:
        files = remote(folder).fs
        names = [name for name in files.find(remote(folder).path) if name.endswith(".json")]
        # All at once: one answer may take as long as the other thousand.
        texts = files.cat(names, on_error="return") if names else {}
        for name, text in list(texts.items()):
            if isinstance(text, FileNotFoundError):  # superseded just now
                del texts[name]
            elif isinstance(text, Exception):  # a store that does not answer must not look like one that is empty
                raise text
    found: dict[str, Any] = {}
    for name, text in texts.items():
        stem = name.rpartition("/")[2].removesuffix(".json")
        try:
            found[stem] = _parsed(folder, text)
        except CacheError:
            found[stem] = None
    return found
