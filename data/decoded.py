"""Decoded clips on disk: what a view shows of a clip, in files that later epochs and runs read instead of decoding."""

import hashlib
import io
import json
import logging
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from .annotations import ClipTable
from .config import DataConfig, digest
from .errors import CacheError
from .identity import input_identity
from .packs import split_pack
from .places import is_local, sizes
from .publish import publish, sweep

logger = logging.getLogger(__name__)
# Writes that may wait at a time: a slow disk then holds up training rather than filling memory.
N_WAITING = 32
HEADER_BYTES, CHECKSUM_BYTES = 128, 4


class DecodedClips:
    """Arrays by (clip, view, modality) under the settings of `data`; used in a `with` block.

    One file each, `<modality>/<identity>/<..>/<clip>-<view>.npy`: NumPy's format, then a CRC-32 of it.  The identity is
    that of the input (settings, decoder, preprocessing), `<clip>` stands for its name and times and for its files:
    where they are, and on this machine their size and when they were changed.  Nothing is removed: when all files of
    the folder have reached the limit, what is new is not kept.
    """

    def __init__(
        self, table: ClipTable, data: DataConfig, modalities: Sequence[str], limit_bytes: int, n_sharing: int = 1
    ) -> None:
        """limit_bytes: of all files in data.inputs, as counted now; runs side by side do not count each other's.

        n_sharing: ranks that fill what is left of it together.
        """
        self.folder, self.limit_bytes = data.inputs, limit_bytes
        self._folders = {m: data.inputs / m / digest(input_identity(m, data)) for m in modalities}
        self._table = table
        self._names: dict[int, str] = {}
        self._under_way: set[Path] = set()
        sweep(data.inputs)
        self._room = (limit_bytes - sum(sizes(data.inputs).values())) // n_sharing
        self._is_full = False
        self._threads = ThreadPoolExecutor(2, "decoded")
        self._turn = threading.BoundedSemaphore(N_WAITING)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._threads.shutdown(cancel_futures=error is not None)

    def path(self, row: int, view: int, modality: str) -> Path:
        """Return where the array of a table row is, or would be."""
        if row not in self._names:
            clip = self._table.clip(row)
            files = [clip.video, *(path for path in clip.sources.values() if path)]
            said = [self._table.sources(row), *(_stamp(path) for path in files)]
            self._names[row] = hashlib.blake2b(json.dumps(said).encode(), digest_size=10).hexdigest()
        name = self._names[row]
        return self._folders[modality] / name[:2] / f"{name[2:]}-{view}.npy"

    def read(self, row: int, view: int, modality: str) -> "Future[np.ndarray | None] | None":
        """Begin to read an array; None if it is not there.  A file that turns out to be damaged gives None later."""
        path = self.path(row, view, modality)
        return self._threads.submit(_read, path) if path.exists() else None

    def keep(self, row: int, view: int, modality: str, array: np.ndarray) -> None:
        """Have an array written, unless there is no room for it or it is there."""
        path = self.path(row, view, modality)
        if self._is_full or path in self._under_way or path.exists():
            return
        self._room -= array.nbytes + HEADER_BYTES + CHECKSUM_BYTES
        if self._room < 0:
            self._is_full = True
            logger.warning(
                "%s: %.1f GB of decoded clips are reached; others are decoded in every epoch. Raise --decoded-gb, or "
                "remove what other settings have left there.", self.folder, self.limit_bytes / 1e9
            )  # fmt: skip
            return
        self._under_way.add(path)
        self._turn.acquire()
        self._threads.submit(self._write, path, array)

    def _write(self, path: Path, array: np.ndarray) -> None:
        try:
            file = io.BytesIO()
            np.lib.format.write_array(file, array, allow_pickle=False)
            text = file.getbuffer()
            publish(path, b"".join((text, zlib.crc32(text).to_bytes(CHECKSUM_BYTES, "little"))), durable=False)
        except CacheError as error:
            self._is_full = True
            logger.warning("%s Clips that are not there yet are decoded in every epoch.", error)
        finally:
            self._under_way.discard(path)
            self._turn.release()


def _read(path: Path) -> np.ndarray | None:
    """Return the array of a file; None, and the file is gone, if it is damaged."""
    try:
        text = path.read_bytes()
        body = memoryview(text)[:-CHECKSUM_BYTES]
        if len(body) and zlib.crc32(body) == int.from_bytes(text[-CHECKSUM_BYTES:], "little"):
            return np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)
    except OSError as error:
        logger.warning("%s: cannot be read (%s); decoding the clip anew.", path, error.strerror)
        return None
    logger.warning("%s: damaged; decoding the clip anew.", path)
    with suppress(OSError):  # a folder that is only lent to us
        path.unlink()
    return None


def _stamp(path: Path) -> list[Any]:
    """Return what tells a file from another of its name: where it is, its size and when it was changed."""
    pack = split_pack(path)
    file = pack[0] if pack else path
    if not is_local(file) or not file.exists():
        return [str(path)]
    about = file.stat()
    return [str(file.resolve()), about.st_size, about.st_mtime_ns]
