"""Whole shards of one Zarr array: encoded for publishing, and read back clip by clip without going through zarr.

A shard of ours is a row of raw little-endian chunks, one a (clip, view), and an index of (offset, bytes) for each,
closed by a crc32c: Zarr v3 `sharding_indexed` with the inner codec `bytes` alone.  Anything else is left to zarr.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from google_crc32c import value as crc32c
from zarr.storage import MemoryStore

from .errors import CacheError
from .modality import UNWRITTEN
from .places import is_local, remote, storage_errors
from .publish import read_json

if TYPE_CHECKING:
    from zarr.abc.buffer import Buffer

MISSING = 2**64 - 1  # as the offset of a chunk that was left out, in the file
LEFT_OUT = -1  # and here
OPEN_FILES = 128
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of the container, where there is one
MEMORY_SHARE = 4  # of the memory for one array: as many as four modalities are read side by side
AGAIN = "Run karmma cache verify --drop, then karmma extract."
# What a receipt has to say of its shard, and in which form; one that does not is none.
RECEIPT = {
    "bytes": int, "sha256": str, "state_sha256": str, "first_row": int, "rows": list, "counts": dict, "failures": list
}  # fmt: skip


def is_receipt(found: Any) -> bool:
    """Say whether a JSON value says all that a receipt has to."""
    return isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in RECEIPT.items())


def shard_file(folder: Path, shard: int, view: int) -> Path:
    """Return the file of one shard and view of the token array in `folder`."""
    return folder / "c" / str(shard) / str(view) / "0" / "0"


def state_file(folder: Path, shard: int, view: int) -> Path:
    """Return the file of one shard and view of the state array in `folder`."""
    return folder / "c" / str(shard) / str(view)


def is_plain_state(states: "zarr.Array[Any]", shard_rows: int) -> bool:
    """Say whether every chunk of an array of states is a file of bytes, one a clip."""
    return (
        states.chunks == (shard_rows, 1)
        and states.shards is None
        and states.dtype == np.uint8
        and states.fill_value == UNWRITTEN
        and states.metadata.zarr_format == 3
        and [type(codec).__name__ for codec in states.metadata.codecs] == ["BytesCodec"]
        and states.metadata.chunk_key_encoding.encode_chunk_key((0, 0)) == "c/0/0"
    )


def array_in(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    """Return an array of a store; raises KeyError if there is none of that name, TypeError if it is a group."""
    found = group[name]
    if not isinstance(found, zarr.Array):
        raise TypeError(f"{name} is a group, expected an array")
    return found


def encode_shard(like: "zarr.Array[Any]", rows: np.ndarray) -> bytes:
    """Return the bytes of one whole shard of the array `like`, as zarr itself encodes them.

    rows: [n, 1, ...], n at most the clips of a shard; chunks that hold only the fill value are left out, as zarr does.
    """
    assert like.shards is not None  # as `TokenStore.create` made it
    files: dict[str, Buffer] = {}
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
    size = int(np.prod(shape[1:])) * 2
    out = np.full(shape, np.nan, np.float16)
    for row, offset in zip(out, _offsets(data[-_index_bytes(shape[0]) :], shape[0], size, where), strict=True):
        if offset != LEFT_OUT:
            if offset + size > len(data):
                raise CacheError(f"{where}: a chunk of a shard reaches beyond it. {AGAIN}")
            row[:] = np.frombuffer(data, "<f2", size // 2, offset).reshape(shape[1:])
    return out


def _index_bytes(shard_rows: int) -> int:
    return 16 * shard_rows + 4


def _offsets(index: bytes, shard_rows: int, chunk_bytes: int, where: Path | str) -> list[int]:
    """Return where the chunk of each row begins, LEFT_OUT where it was left out; raise CacheError if damaged."""
    if len(index) != _index_bytes(shard_rows) or crc32c(index[:-4]) != int.from_bytes(index[-4:], "little"):
        raise CacheError(f"{where}: its index fails the checksum. {AGAIN}")
    offsets, sizes = np.frombuffer(index[:-4], "<u8").reshape(-1, 2).T
    left_out = offsets == MISSING
    if not (left_out | (sizes == chunk_bytes)).all():
        raise CacheError(f"{where}: a chunk of a shard is not of {chunk_bytes} bytes. {AGAIN}")
    return np.where(left_out, LEFT_OUT, offsets.astype(np.int64)).tolist()


def memory_bytes() -> int:
    """Return the memory of this machine, or what its container may use of it."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = LIMIT.read_text().strip() if LIMIT.exists() else ""
    return min(whole, int(text)) if text.isdecimal() else whole


class ShardFiles:
    """Positional reads of single clips from the shards of one token array [N, V, k, D], by any number of threads.

    The index of each file is read once.  Files are mapped where the array may stay in memory, which spares a copy by
    the kernel, and else read at a position: the first touch of every mapped page would be a wait of its own.
    """

    def __init__(self, folder: Path) -> None:
        meta = read_json(folder / "zarr.json")
        self.folder, self.shape = folder, tuple(meta["shape"])
        self.shard_rows = meta["chunk_grid"]["configuration"]["chunk_shape"][0]
        self.chunk_bytes = prod(self.shape[2:]) * 2  # float16
        self._is_mapped = prod(self.shape) * 2 <= memory_bytes() // MEMORY_SHARE
        self._index: dict[tuple[int, int], list[int]] = {}
        self._open: OrderedDict[tuple[int, int], _File] = OrderedDict()
        self._lock = threading.Lock()

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
            and meta["data_type"] == "float16"
            and inner["chunk_shape"] == [1, 1, *shape[2:]]
            and grid[1:] == [1, *shape[2:]]
        )

    def read_into(self, rows: np.ndarray, view: int, out: np.ndarray) -> None:
        """Fill out [n, k, D], contiguous, with the tokens of `rows`; a clip that is absent or failed with NaN.

        Raises CacheError if a shard is missing, cut short or its index fails the checksum.
        """
        if not len(rows):
            return
        keys = [(shard, view) for shard in (rows // self.shard_rows).tolist()]
        withins, flat, size = (rows % self.shard_rows).tolist(), memoryview(out).cast("B"), self.chunk_bytes
        if not is_local(self.folder):
            self._fetch(keys, withins, flat)
            return
        for place, (key, within) in enumerate(zip(keys, withins, strict=True)):
            file = self._opened(key)
            offset = file.offsets[within]
            part = flat[place * size : (place + 1) * size]
            if offset == LEFT_OUT:
                _fill_with_nan(part)
            elif (found := file.read_into(part, offset)) != size:
                raise CacheError(f"{self.path(*key)}: a clip has {found} bytes, expected {size}. {AGAIN}")

    def path(self, shard: int, view: int) -> Path:
        """Return the file of one shard and view."""
        return shard_file(self.folder, shard, view)

    def _opened(self, key: tuple[int, int]) -> "_File":
        with self._lock:
            if key not in self._open:
                file = self._open[key] = _File(self.path(*key), self._is_mapped)
                index = bytearray(_index_bytes(self.shard_rows))
                file.read_into(memoryview(index), max(os.fstat(file.number).st_size - len(index), 0))
                # They belong to this very file: the shard may be made anew, with other chunks left out, while we read.
                file.offsets = _offsets(bytes(index), self.shard_rows, self.chunk_bytes, file.path)
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)  # closed once the last thread has read from it
            self._open.move_to_end(key)
            return self._open[key]

    def _fetch(self, keys: list[tuple[int, int]], withins: list[int], flat: memoryview) -> None:
        """Do as `read_into` from an object store: all indices that are needed at once, then all clips at once."""
        size, shards = self.chunk_bytes, sorted(set(keys))
        used = {key: index for key in shards if (index := self._index.get(key)) is not None}
        used |= self._indices([key for key in shards if key not in used])
        self._index.update(used)
        offsets = [used[key][within] for key, within in zip(keys, withins, strict=True)]
        there = [place for place, offset in enumerate(offsets) if offset != LEFT_OUT]
        found = iter(self._ranges([keys[place] for place in there], [offsets[place] for place in there], size))
        for place, offset in enumerate(offsets):
            part = flat[place * size : (place + 1) * size]
            if offset == LEFT_OUT:
                _fill_with_nan(part)
            elif len(data := next(found)) != size:
                raise CacheError(f"{self.path(*keys[place])}: a clip has {len(data)} bytes, expected {size}. {AGAIN}")
            else:
                part[:] = data
        for key, index in self._indices(shards).items():
            if index != used[key]:  # its chunks lie elsewhere by now
                self._index.pop(key, None)
                raise CacheError(f"{self.path(*key)}: was made anew while it was read. Give the command again.")

    def _indices(self, keys: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
        """Return where the chunks of some shards of an object store begin."""
        n = _index_bytes(self.shard_rows)
        found = zip(keys, self._ranges(keys, [-n] * len(keys), None), strict=True)
        return {key: _offsets(index, self.shard_rows, self.chunk_bytes, self.path(*key)) for key, index in found}

    def _ranges(self, keys: list[tuple[int, int]], starts: list[int], n_bytes: int | None) -> Iterable[bytes]:
        ends = [None if n_bytes is None else start + n_bytes for start in starts]
        paths = [remote(self.path(*key)).path for key in keys]
        try:
            return remote(self.folder).fs.cat_ranges(paths, starts, ends, on_error="raise") if keys else []
        except FileNotFoundError as error:
            raise CacheError(f"{error}: this shard is missing. Extract again.") from None
        except storage_errors() as error:
            raise CacheError(f"{self.folder}: cannot be read: {error}. Give the command again.") from None


class _File:
    """An open file that closes itself once nobody uses it: a thread may be reading when another lets go of it."""

    def __init__(self, path: Path, is_mapped: bool) -> None:
        self.path, self.number = path, -1
        self.offsets: list[int] = []
        try:
            self.number = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise CacheError(f"{path}: this shard is missing. Extract again.") from None
        is_mapped = is_mapped and os.fstat(self.number).st_size > 0
        # A file of ours never changes under its name, so that what is mapped stays there.
        self._bytes = np.frombuffer(mmap(self.number, 0, access=ACCESS_READ), np.uint8) if is_mapped else None

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    def read_into(self, part: memoryview, offset: int) -> int:
        """Fill `part` from a position; return the number of bytes, less than asked for only at the end of the file."""
        if self._bytes is not None:
            found = self._bytes[offset : offset + len(part)]
            np.frombuffer(part, np.uint8)[: len(found)] = found
            return len(found)
        at = 0
        try:
            while at < len(part) and (n_read := os.preadv(self.number, [part[at:]], offset + at)):
                at += n_read
        except OSError as error:
            raise CacheError(f"{self.path}: cannot be read: {error.strerror}. Check the disk.") from None
        return at


def _fill_with_nan(part: memoryview) -> None:
    np.frombuffer(part, np.float16)[:] = np.nan
