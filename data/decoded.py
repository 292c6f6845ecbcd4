"""Decoded clips on disk: what a view shows of a clip, in files that later epochs and runs read instead of decoding."""

import hashlib
import io
import logging
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np

from .annotations import ClipTable
from .cache import table_digests
from .config import DataConfig, digest
from .errors import CacheError
from .identity import input_identity
from .places import sizes
from .publish import publish, sweep

logger = logging.getLogger(__name__)
# Writes that may wait at a time: a slow disk then holds up training rather than filling memory.
N_WAITING = 32
HEADER_BYTES, CHECKSUM_BYTES = 128, 4


class DecodedClips:
    """Arrays by (clip, view, modality) under the settings of `data`; used in a `with` block.

    One file each, `<modality>/<identity>/<..>/<clip>-<view>.npy`: NumPy's format, then a CRC-32 of it.  The identity is
    that of the input (settings, decoder, preprocessing), `<clip>` stands for its name, sources and times.  Nothing is
    removed: when all files of the folder have reached the limit, what is new is not kept.
    """

    def __init__(
        self, table: ClipTable, data: DataConfig, modalities: Sequence[str], limit_bytes: int, n_sharing: int = 1
    ) -> None:
        """limit_bytes: of all files in data.inputs.  n_sharing: processes that fill what is left of it together."""
        self.folder, self.limit_bytes = data.inputs, limit_bytes
        self._folders = {m: data.inputs / m / digest(input_identity(m, data)) for m in modalities}
        self._names, self._clip_ids = table_digests(table), table.clip_ids
        sweep(data.inputs)
        self._room = (limit_bytes - sum(sizes(data.inputs).values())) // n_sharing
        self._is_full = False
        self._threads = ThreadPoolExecutor(2, "decoded")
        self._turn = threading.BoundedSemaphore(N_WAITING)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def path(self, row: int, view: int, modality: str) -> Path:
        """Return where the array of a table row is, or would be."""
        name = hashlib.blake2b(f"{self._clip_ids[row]} {self._names[row]}".encode(), digest_size=10).hexdigest()
        return self._folders[modality] / name[:2] / f"{name[2:]}-{view}.npy"

    def read(self, row: int, view: int, modality: str) -> "Future[np.ndarray | None] | None":
        """Begin to read an array; None if it is not there.  A file that turns out to be damaged gives None later."""
        path = self.path(row, view, modality)
        return self._threads.submit(_read, path) if path.exists() else None

    def keep(self, row: int, view: int, modality: str, array: np.ndarray) -> None:
        """Have an array written, unless there is no room for it or it is there."""
        if self._is_full or (path := self.path(row, view, modality)).exists():
            return
        self._room -= array.nbytes + HEADER_BYTES + CHECKSUM_BYTES
        if self._room < 0:
            self._is_full = True
            logger.warning(
                "%s: %.1f GB of decoded clips are reached; others are decoded in every epoch. Raise --decoded-gb, or "
                "remove what other settings have left there.", self.folder, self.limit_bytes / 1e9
            )  # fmt: skip
            return
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
    path.unlink(missing_ok=True)
    return None
