"""Whole shards of one Zarr array: encoded for publishing, and read back clip by clip without going through zarr.

A shard of ours is a row of raw little-endian chunks, one a (clip, view), and an index of (offset, bytes) for each,
closed by a crc32c: Zarr v3 `sharding_indexed` with the inner codec `bytes` alone.  Anything else is left to zarr.
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from google_crc32c import value as crc32c
from zarr.storage import MemoryStore

from .errors import CacheError
from .publish import read_json

MISSING = 2**64 - 1
OPEN_FILES = 128


def shard_file(folder: Path, shard: int, view: int) -> Path:
    """Return the file of one shard and view of the token array in `folder`."""
    return folder / "c" / str(shard) / str(view) / "0" / "0"


def state_file(folder: Path, shard: int, view: int) -> Path:
    """Return the file of one shard and view of the state array in `folder`."""
    return folder / "c" / str(shard) / str(view)


def encode_shard(like: zarr.Array, rows: np.ndarray) -> bytes:
    """Return the bytes of one whole shard of the array `like`, as zarr itself encodes them.

    rows: [n, 1, ...], n at most the clips of a shard; chunks that hold only the fill value are left out, as zarr does.
    """
    files: dict = {}
    shape = (like.shards[0], *rows.shape[1:])
    array = zarr.create_array(
        MemoryStore(files),
        shape=shape,
        shards=like.shards,
        chunks=like.chunks,
        dtype=like.dtype,
        fill_value=like.fill_value,
        compressors=None,
        zarr_format=3,
    )
    array[: len(rows)] = rows
    found = files.get("c/" + "/".join("0" * len(shape)))
    if found is not None:
        return found.to_bytes()
    # Every row holds the fill value: zarr would write no file, but a receipt needs one to stand for.
    index = np.full((like.shards[0], 2), MISSING, "<u8").tobytes()
    return index + crc32c(index).to_bytes(4, "little")


def decode_shard(data: bytes, shape: tuple[int, int, int], where: str) -> np.ndarray:
    """Return the rows [S, k, D] float16 of one whole shard of ours; NaN where a chunk was left out.

    shape: (S, k, D).  Raises CacheError, which names `where`, if the bytes are damaged in form.
    """
    n, size = shape[0], int(np.prod(shape[1:])) * 2
    index = data[len(data) - 16 * n - 4 :]
    if len(index) != 16 * n + 4 or crc32c(index[:-4]) != int.from_bytes(index[-4:], "little"):
        raise CacheError(f"{where}: the index of a shard fails the checksum. Run karmma cache verify.")
    out = np.full(shape, np.nan, np.float16)
    for row, (offset, length) in zip(out, np.frombuffer(index[:-4], "<u8").reshape(n, 2).tolist(), strict=True):
        if offset != MISSING:
            if length != size or offset + size > len(data):
                raise CacheError(f"{where}: a chunk of a shard reaches beyond it. Run karmma cache verify.")
            row[:] = np.frombuffer(data, "<f2", size // 2, offset).reshape(shape[1:])
    return out


class ShardFiles:
    """Positional reads of single clips from the shard files of one token array [N, V, k, D]."""

    def __init__(self, folder: Path) -> None:
        meta = read_json(folder / "zarr.json")
        self.folder, self.shape = folder, tuple(meta["shape"])
        self.dtype = np.dtype(meta["data_type"])
        self.shard_rows = meta["chunk_grid"]["configuration"]["chunk_shape"][0]
        self.chunk_bytes = int(np.prod(self.shape[2:])) * self.dtype.itemsize
        self._index: dict[tuple[int, int], np.ndarray] = {}
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()

    @staticmethod
    def understands(meta: dict[str, Any]) -> bool:
        """Say whether an array's zarr.json describes the layout that this class reads."""
        codecs, shape = meta.get("codecs", []), meta["shape"]
        if [codec["name"] for codec in codecs] != ["sharding_indexed"] or len(shape) != 4:
            return False
        inner, grid = codecs[0]["configuration"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        return (
            [codec["name"] for codec in inner["codecs"]] == ["bytes"]
            and inner["codecs"][0]["configuration"].get("endian") == "little"
            and [codec["name"] for codec in inner["index_codecs"]] == ["bytes", "crc32c"]
            and inner.get("index_location", "end") == "end"
            and meta["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            and inner["chunk_shape"] == [1, 1, *shape[2:]]
            and grid[1:] == [1, *shape[2:]]
        )

    def read_into(self, rows: np.ndarray, view: int, out: np.ndarray) -> None:
        """Fill out [n, k, D] with the tokens of `rows`; a clip that was never written is filled with NaN.

        Raises CacheError if a shard is missing, cut short or fails its checksum.
        """
        for place, row in enumerate(rows):
            shard, within = divmod(int(row), self.shard_rows)
            offset, size = self._entry(shard, view)[within]
            if offset == MISSING:
                out[place] = np.nan
                continue
            found = os.preadv(self._handle(shard, view), [memoryview(out[place]).cast("B")], int(offset))
            if found != self.chunk_bytes or size != self.chunk_bytes:
                raise CacheError(
                    f"{self.path(shard, view)}: clip row {row} has {found} bytes, expected "
                    f"{self.chunk_bytes}. Delete the file and its receipt, then extract again."
                )

    def path(self, shard: int, view: int) -> Path:
        """Return the file of one shard and view."""
        return shard_file(self.folder, shard, view)

    def _entry(self, shard: int, view: int) -> np.ndarray:
        if (shard, view) not in self._index:
            handle, size = self._handle(shard, view), self.shard_rows * 16
            start = os.fstat(handle).st_size - size - 4
            raw = os.pread(handle, size + 4, max(start, 0))
            if start < 0 or crc32c(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
                raise CacheError(
                    f"{self.path(shard, view)}: its index fails the checksum. "
                    "Delete the file and its receipt, then extract again."
                )
            self._index[shard, view] = np.frombuffer(raw[:-4], "<u8").reshape(-1, 2)
        return self._index[shard, view]

    def _handle(self, shard: int, view: int) -> int:
        key = (shard, view)
        if key not in self._open:
            try:
                self._open[key] = os.open(self.path(shard, view), os.O_RDONLY)
            except FileNotFoundError:
                raise CacheError(f"{self.path(shard, view)}: this shard is missing. Extract again.") from None
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(key)
        return self._open[key]

    def close(self) -> None:
        """Close every file that is open."""
        while self._open:
            os.close(self._open.popitem()[1])
