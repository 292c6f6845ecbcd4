"""TokenStore and LogitStore: genuine Zarr v3 groups with an explicit state for every (clip, view)."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr

from .config import digest
from .errors import CacheError, IncompleteCacheError, KarmmaError, is_memory_short
from .identity import FORMAT
from .modality import PRESENT, UNWRITTEN
from .places import is_local, place, read_bytes, zarr_store
from .publish import publish, publish_folder, read_json, sweep
from .shards import AGAIN, ShardFiles, array_in, decode_shard, encode_shard, is_plain_state, shard_file, state_file


def _opened(path: Path) -> zarr.Group:
    if not (path / "zarr.json").exists():
        raise CacheError(f"{path}: no such store. Run the command that makes it, or name another.")
    group = zarr.open_group(**zarr_store(path), mode="r", use_consolidated=False)
    attributes: dict[str, Any] = dict(group.attrs)
    found = {**attributes, **attributes.get("identity", {})}.get("format", FORMAT)
    if found > FORMAT:
        raise CacheError(f"{path}: has format {found}, this version reads up to {FORMAT}. Install a newer karmma.")
    return group


@contextmanager
def _described(path: Path) -> Iterator[None]:
    """Turn whatever zarr says of a damaged store into one CacheError that names it."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(f"{path}: cannot be read: {error}. Mend that and give the command again.") from None
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        if is_memory_short(error):  # which says nothing about the store
            raise
        raise CacheError(f"{path}: damaged: {error}. Run karmma cache verify.") from None


def _checksums(attributes: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Return by name the checksum of every array of a store, and under zarr.json that of its attributes."""
    about = {name: value for name, value in attributes.items() if name != "sha256"}
    whole = {name: np.ascontiguousarray(values).view(np.uint8) for name, values in arrays.items()}
    return {"zarr.json": digest(about), **{name: hashlib.sha256(held).hexdigest() for name, held in whole.items()}}


class TokenStore:
    """The tokens of one modality under one identity: `tokens` [N, V, k, D] float16 and `state` [N, V] uint8."""

    def __init__(self, path: Path) -> None:
        with _described(path):
            self.path, self.group = path, _opened(path)
            self.tokens, self.states = array_in(self.group, "tokens"), array_in(self.group, "state")
            self.n_clips, self.n_views, self.k, self.width = self.tokens.shape
            self.shard_rows = (self.tokens.shards or self.tokens.chunks)[0]
            plain = ShardFiles.understands(read_json(path / "tokens" / "zarr.json"))
            self._files = ShardFiles(path / "tokens") if plain else None

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open an existing store for reading; raises CacheError if there is none."""
        return cls(place(path))

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int, int, int], shard_rows: int, attributes: dict[str, Any]) -> Self:
        """Make an empty store of shape [N, V, k, D]; the folder appears whole."""

        def fill(folder: Path) -> None:
            group = zarr.open_group(str(folder), mode="w", zarr_format=3, attributes=attributes)
            # NaN, not 0: a row that leaks without having been written must be loud.
            group.create_array(
                "tokens",
                shape=shape,
                shards=(shard_rows, 1, *shape[2:]),
                chunks=(1, 1, *shape[2:]),
                dtype="float16",
                fill_value=np.nan,
                compressors=None,
                dimension_names=("clip", "view", "token", "width"),
            )
            group.create_array(
                "state",
                shape=shape[:2],
                chunks=(shard_rows, 1),
                dtype="uint8",
                fill_value=UNWRITTEN,
                compressors=None,
                dimension_names=("clip", "view"),
            )

        publish_folder(path, fill)
        return cls(path)

    def has_room(self, n_clips: int, n_views: int) -> bool:
        """Say whether the arrays are large enough for so many clips and views."""
        return n_clips <= self.n_clips and n_views <= self.n_views

    def grown(self, n_clips: int, n_views: int) -> Self:
        """Return the store with room for at least so many clips and views; no row is touched."""
        if self.has_room(n_clips, n_views):
            return self
        shape = [max(n_clips, self.n_clips), max(n_views, self.n_views)]
        # The state first: whoever is killed in between leaves tokens without room, which the next one sees.
        for name in ("state", "tokens"):  # as zarr writes it, but published
            meta = read_json(self.path / name / "zarr.json")
            meta["shape"][:2] = shape
            publish(self.path / name / "zarr.json", json.dumps(meta, indent=zarr.config.get("json_indent")).encode())
        return type(self)(self.path)

    def write_shard(self, shard: int, view: int, tokens: np.ndarray, state: np.ndarray) -> tuple[bytes, bytes]:
        """Publish one whole shard: tokens [n, k, D] float16, state [n] uint8, n at most `shard_rows`.

        Returns the bytes of both files, for the receipt.  Neither is readable in part at any instant.
        """
        data = encode_shard(self.tokens, tokens[:, None])
        publish(shard_file(self.path / "tokens", shard, view), data)
        padded = np.full(self.shard_rows, UNWRITTEN, np.uint8)
        padded[: len(state)] = state
        publish(state_file(self.path / "state", shard, view), padded.tobytes())
        return data, padded.tobytes()

    def read_shard(self, shard: int, view: int) -> tuple[bytes, bytes]:
        """Return the bytes of a shard's two files, tokens and state; raises CacheError if one is missing."""
        files = shard_file(self.path / "tokens", shard, view), state_file(self.path / "state", shard, view)
        try:
            return read_bytes(files[0]), read_bytes(files[1])
        except FileNotFoundError as error:
            raise CacheError(f"{error.filename or files[0]}: is missing. Extract again.") from None

    def decoded(self, data: bytes, state: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [shard_rows, k, D] float16 and state [shard_rows] of the bytes of a shard.

        Raises CacheError if they are cut short or the index fails its checksum.
        """
        rows = decode_shard(data, (self.shard_rows, self.k, self.width), str(self.path))
        if len(state) != self.shard_rows:
            raise CacheError(f"{self.path}: a state of {len(state)} bytes, expected {self.shard_rows}. Extract again.")
        return rows, np.frombuffer(state, np.uint8)

    def state(self, rows: np.ndarray, view: int) -> np.ndarray:
        """Return the state [n] of rows: 0 unwritten, 1 present, 2 absent, 3 failed."""
        if view >= self.n_views:
            raise IncompleteCacheError(
                f"{self.path}: has {self.n_views} view(s), asked for view {view}. Extract with --views {view + 1}."
            )
        return self._states(view)[rows]

    def _states(self, view: int) -> np.ndarray:
        """Return the state [N] of all clips in a view; zarr needs a good half of a millisecond for each shard of it."""
        if self._files is None or not is_local(self.path) or not is_plain_state(self.states, self.shard_rows):
            return np.asarray(self.states[:, view])
        out = np.full(-(-self.n_clips // self.shard_rows) * self.shard_rows, UNWRITTEN, np.uint8)
        for shard, part in enumerate(out.reshape(-1, self.shard_rows)):
            with suppress(FileNotFoundError):
                found = state_file(self.path / "state", shard, view).read_bytes()
                if len(found) != self.shard_rows:
                    raise CacheError(f"{self.path}: a state of {len(found)} bytes, expected {self.shard_rows}. {AGAIN}")
                part[:] = np.frombuffer(found, np.uint8)
        return out[: self.n_clips]

    def read(self, rows: np.ndarray, view: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return tokens [n, k, D] float16 of rows, in their order; rows that are absent or failed hold NaN.

        Raises IncompleteCacheError if a row was never written, CacheError if a shard is damaged.
        """
        rows = np.asarray(rows)
        self.require_written(rows, view)
        return self.read_written(rows, view, out)

    def read_written(self, rows: np.ndarray, view: int, out: np.ndarray | None = None) -> np.ndarray:
        """Do as `read` for rows whose state the caller has already seen: no look at `state`."""
        out = np.empty((len(rows), self.k, self.width), np.float16) if out is None else out
        if self._files is not None:
            self._files.read_into(rows, view, out)
            return out
        for at, row in enumerate(rows):
            out[at] = self.tokens[int(row), view]
        return out

    def require_written(self, rows: np.ndarray, view: int) -> None:
        """Raise IncompleteCacheError, with the number of rows, unless every row of the view was written."""
        if len(rows) and (np.max(rows) >= self.n_clips or np.min(rows) < 0):
            raise IncompleteCacheError(
                f"{self.path}: has {self.n_clips} clips, asked for row {np.max(rows)}. Extract the new clips first."
            )
        n_missing = int((self.state(rows, view) == UNWRITTEN).sum())
        if n_missing:
            raise IncompleteCacheError(
                f"{self.path}: {n_missing} of {len(rows)} clips were never extracted "
                f"in view {view}. Run karmma extract again."
            )


class LogitStore:
    """A teacher's logits: one array a head [N, V, classes] float32, and `state` [N, V] uint8."""

    def __init__(self, path: Path) -> None:
        with _described(path):
            self.path, self.group = path, _opened(path)
            self.attributes: dict[str, Any] = dict(self.group.attrs)
            self.heads: tuple[str, ...] = tuple(self.attributes["classes"])
            self.states = np.asarray(array_in(self.group, "state")[:])
            self.made_from = np.asarray(array_in(self.group, "made_from")[:])
            self._logits = {head: np.asarray(array_in(self.group, head)[:]) for head in self.heads}
            self.n_clips, self.n_views = self.states.shape

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open an existing store and hold it in memory (106 MB a view for EPIC-KITCHENS-100)."""
        return cls(place(path))

    @classmethod
    def write(
        cls,
        path: Path,
        logits: dict[str, np.ndarray],
        state: np.ndarray,
        made_from: np.ndarray,
        attributes: dict[str, Any],
    ) -> Self:
        """Publish a whole store: logits head -> [N, V, classes], state [N, V]; attributes must name `classes`.

        made_from: [N], eight hex digits for the sources and times of each clip, '' for one that was not asked for.
        """
        for head, values in logits.items():
            if not np.isfinite(values[state == PRESENT]).all():
                raise KarmmaError(
                    f"{path}: the teacher's logits of head {head!r} are not finite. "
                    "Its training diverged: lower max_lr and train again."
                )
        arrays = {head: values.astype(np.float32) for head, values in logits.items()}
        arrays["state"] = state.astype(np.uint8)
        arrays["made_from"] = np.array([int(text or "0", 16) for text in made_from], np.uint32)
        about = {**attributes, "format": FORMAT}
        about["sha256"] = _checksums(about, arrays)

        def fill(folder: Path) -> None:
            group = zarr.open_group(str(folder), mode="w", zarr_format=3, attributes=about)
            for name, values in arrays.items():
                names = ("clip", "view", "class")[: values.ndim]
                # Uncompressed, as logits hardly compress: every byte then counts in the checksum.
                group.create_array(name, data=values, chunks="auto", compressors=None, dimension_names=names)

        sweep(path.parent)  # what those left who were killed here
        publish_folder(path, fill)
        return cls(path)

    def values(self, head: str) -> np.ndarray:
        """Return all logits [N, V, classes] of a head."""
        return self._logits[head]

    def require_sound(self) -> Self:
        """Return the store; raise CacheError, which names the arrays, unless all of it is what was written."""
        if wrong := ", ".join(self.damaged()):
            raise CacheError(f"{self.path}: not what was written: {wrong}. Run karmma cache verify --drop.")
        return self

    def damaged(self) -> list[str]:
        """Return the names of the arrays that are not what was written."""
        arrays = {**self._logits, "state": self.states, "made_from": self.made_from}
        found, wanted = _checksums(self.attributes, arrays), self.attributes.get("sha256", {})
        # The first stores of format 1 had no checksum of their attributes.
        return sorted(name for name in {*arrays, *wanted} if found.get(name) != wanted.get(name))

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return logits head -> [n, classes] of (row, view) pairs; raises IncompleteCacheError if one is not there."""
        rows = np.asarray(rows)
        missing = rows[~self.has(rows, view)]
        if len(missing):
            raise IncompleteCacheError(
                f"{self.path}: no logits for {len(missing)} clip(s) in view {view}, first row "
                f"{missing[0]}. Train the teacher on a cache that has them."
            )
        return {head: values[rows, view] for head, values in self._logits.items()}

    def is_made_from(self, rows: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Say for each row [n] whether its logits were made from the clip with this digest of sources and times."""
        return self.made_from[rows] == np.array([int(text, 16) for text in digests], np.uint32)

    def has(self, rows: np.ndarray, view: int) -> np.ndarray:
        """Say for each row [n] whether its logits of `view` are there."""
        return self._states(rows, view) == PRESENT

    def is_written(self, rows: np.ndarray, view: int) -> np.ndarray:
        """Say for each row [n] whether the teacher was asked about `view`, even if it says nothing."""
        return self._states(rows, view) != UNWRITTEN

    def _states(self, rows: np.ndarray, view: int) -> np.ndarray:
        """Return the states [n]; those of rows and views that are not there are unwritten."""
        inside = (rows < self.n_clips) & (rows >= 0) & (view < self.n_views)
        return np.where(inside, self.states[np.where(inside, rows, 0), min(view, self.n_views - 1)], UNWRITTEN)
