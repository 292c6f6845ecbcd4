"""Tokens and logits to and from HDF5: features from elsewhere train a teacher, a foreign teacher distils a student.

    /clip_id             [N] text
    /tokens/<modality>   [N, V, k, D], [N, k, D] or [N, D], any float; a row that is NaN is absent
    /state/<modality>    [N, V] or [N] uint8: 0 not there, 1 present, 2 absent, 3 failed; may be left out
    /logits/<head>       [N, V, classes] or [N, classes], any float; a row that is NaN is not there
    /classes/<head>      [classes] text; may be left out if the classes are those of the table, in its order

What this package exports also says, as attributes of a modality or of /logits, what the values were made from, and a
checksum, so that importing it gives the same store again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .annotations import ClipTable
from .cache import Cache, table_digests
from .config import digest
from .drafts import open_store
from .errors import CacheError, MediaError, nearest
from .identity import FORMAT
from .modality import ABSENT, FAILED, PRESENT, UNWRITTEN, in_order
from .packs import intact, member
from .publish import written_by
from .stores import LogitStore
from .transfer import Row, StoredRows, fill_rows

if TYPE_CHECKING:
    import h5py

# Bytes of tokens that are held in memory at once.
PIECE_BYTES = 2**26


def export_tokens(cache: Cache, stores: dict[str, str], teacher: str | None, path: Path) -> int:
    """Write token stores (modality -> digest) and a teacher's logits, if one is named, to an HDF5 file.

    Returns the number of clips.  Raises CacheError if a shard is damaged or the file cannot be written.
    """
    import h5py

    with written_by(path) as half, h5py.File(half, "w") as file:
        file.create_dataset("clip_id", data=cache.clip_ids, dtype=h5py.string_dtype())
        for modality, name in stores.items():
            _export_modality(cache, modality, name, file)
        if teacher is not None:
            store = LogitStore.open(cache.logits_path(teacher))
            group = file.create_group("logits")
            group.attrs["about"] = json.dumps(store.attributes)
            for head in store.heads:
                group[head] = _whole(store.values(head), cache.n_clips)
                classes = list(map(str, store.attributes["classes"][head]))
                file.create_dataset(f"classes/{head}", data=classes, dtype=h5py.string_dtype())
    return cache.n_clips


def _export_modality(cache: Cache, modality: str, name: str, file: "h5py.File") -> None:
    n_views = cache.n_views(modality, name)
    views = [StoredRows(cache, modality, name, view) for view in range(n_views)]
    k, width = views[0].store.k, views[0].store.width
    shape, chunk = (cache.n_clips, n_views, k, width), (1, 1, k, width)
    tokens = file.create_dataset(f"tokens/{modality}", shape, "f2", chunks=chunk, fillvalue=np.nan)
    tokens.attrs["identity"] = json.dumps(cache.identities(modality)[name])
    state = file.create_dataset(f"state/{modality}", data=np.stack([rows.states() for rows in views], axis=1))
    for view, rows in enumerate(views):
        (there,) = np.nonzero(state[:, view] == PRESENT)
        for row, (_, values, _) in zip(there.tolist(), rows.read(there), strict=True):
            tokens[row, view] = values
    tokens.attrs["sha256"] = _checksum(tokens)


def _whole(values: np.ndarray, n_clips: int) -> np.ndarray:
    """Return logits with a row of NaN for each clip that the cache has been given since."""
    return np.concatenate([values, np.full((n_clips - len(values), *values.shape[1:]), np.nan, values.dtype)])


def _checksum(dataset: "h5py.Dataset") -> str:
    """Return the SHA-256 of a dataset's values, read piece by piece."""
    found, step = hashlib.sha256(), max(1, PIECE_BYTES // max(1, dataset[:1].nbytes))
    for at in range(0, len(dataset), step):
        found.update(np.ascontiguousarray(dataset[at : at + step]))
    return found.hexdigest()


class ForeignFile:
    """An HDF5 file of tokens and logits; its clips are joined to a table by id."""

    def __init__(self, path: Path, file: "h5py.File", table: ClipTable) -> None:
        self.path, self.file, self.table = path, file, table
        row_of = {clip_id: row for row, clip_id in enumerate(table.clip_ids.tolist())}
        ids = [_text(value) for value in self.dataset("clip_id")[:]]
        if len(set(ids)) < len(ids):
            raise CacheError(f"{path}: clip_id names {len(ids) - len(set(ids))} clip(s) twice. Keep one row of each.")
        self.rows = np.array([row_of.get(clip_id, -1) for clip_id in ids], np.int64)  # of the table; -1 unknown
        if not (self.rows >= 0).any():
            raise CacheError(f"{path}: none of its {len(ids)} clips is in {table.path}. Name the table it belongs to.")

    def dataset(self, name: str) -> Any:
        """Return a member of the file by its path; raises CacheError if it is not there or leads out of the file."""
        found: Any = self.file
        for part in name.split("/"):
            found = member(self.path, found, part)
        return found

    @property
    def modalities(self) -> list[str]:
        """Modalities that the file has tokens of; raises CacheError if it has neither tokens nor logits."""
        if "tokens" not in self.file and not self.has_logits:
            raise CacheError(f"{self.path}: neither tokens nor logits in it. docs/cache.md says how such a file looks.")
        return list(in_order(self.dataset("tokens"))) if "tokens" in self.file else []

    @property
    def has_logits(self) -> bool:
        """Whether the file has a teacher's logits."""
        return "logits" in self.file

    @property
    def n_unknown(self) -> int:
        """Clips of the file that the table does not have."""
        return int((self.rows < 0).sum())


@contextmanager
def open_foreign(path: Path, table: ClipTable) -> Iterator[ForeignFile]:
    """Open a file of features for the clips of a table; raises CacheError if it is damaged or of another form."""
    import h5py

    try:
        with intact(path), h5py.File(path, "r") as file:
            yield ForeignFile(path, file, table)
    except MediaError as error:
        raise CacheError(str(error)) from None


def import_tokens(cache: Cache, foreign: ForeignFile, modality: str, shard_rows: int) -> tuple[str, int]:
    """Take the tokens of a modality into a store of their own; return its digest and the number of rows taken.

    The store of tokens that this package exported has its old identity again; any other is told by its content.
    Raises CacheError if the shape does not fit, a checksum fails, or values are too large for float16.
    """
    tokens = foreign.dataset(f"tokens/{modality}")
    if tokens.ndim not in (2, 3, 4) or tokens.dtype.kind != "f" or len(tokens) != len(foreign.rows):
        raise CacheError(
            f"{foreign.path}: tokens/{modality} is {tokens.dtype} {list(tokens.shape)}, expected a float array "
            f"[{len(foreign.rows)}, views, k, D], or without views, or without views and k."
        )
    cache.add_clips(foreign.table)
    n_views = tokens.shape[1] if tokens.ndim == 4 else 1
    k, width = (1, *tokens.shape[-2:])[-2:] if tokens.ndim > 2 else (1, tokens.shape[1])
    identity = _identity(foreign, modality, tokens)
    name = digest(identity)
    store = open_store(cache, modality, name, identity, (cache.n_clips, n_views, k, width), shard_rows)
    known = np.flatnonzero(foreign.rows >= 0)
    cache_rows = cache.rows(foreign.table.clip_ids[foreign.rows[known]])
    source = np.full(cache.n_clips, -1)
    source[cache_rows] = known
    digests, n_taken = cache.row_digests(), 0
    for view in range(n_views):
        state = _states(foreign, modality, tokens, view)
        asked = np.where((source >= 0) & (state[source] != UNWRITTEN), digests, "")
        read = _reader(tokens, state, source, view, (k, width))
        n_taken += fill_rows(cache, store, (modality, name, view), asked, read, {"imported_from": foreign.path.name})
    return name, n_taken


def _identity(foreign: ForeignFile, modality: str, tokens: "h5py.Dataset") -> dict[str, Any]:
    content = _checksum(tokens)
    if "identity" in tokens.attrs:
        if tokens.attrs.get("sha256") != content:
            raise CacheError(f"{foreign.path}: tokens/{modality} fails its checksum. Fetch or export the file again.")
        return json.loads(tokens.attrs["identity"])
    return {
        "format": FORMAT,
        "modality": modality,
        "backbone": {"name": "imported", "weights": content[:16]},
        "precision": str(tokens.dtype),
        "input": {"imported": content[:16]},  # what the features were made from is not for us to say
        "theta": None,
        "dtype": "float16",
    }


def _view(array: Any, view: int, n_dims: int) -> Callable[[int], np.ndarray]:
    return (lambda row: array[row, view]) if array.ndim == n_dims else (lambda row: array[row])


def _states(foreign: ForeignFile, modality: str, tokens: Any, view: int) -> np.ndarray:
    """Return the state [rows of the file] of a view; without states a row of NaN is absent."""
    if f"state/{modality}" in foreign.file:
        state = foreign.dataset(f"state/{modality}")[:]
        if len(state) != len(foreign.rows) or not np.isin(state, (UNWRITTEN, PRESENT, ABSENT, FAILED)).all():
            raise CacheError(f"{foreign.path}: state/{modality} must hold 0, 1, 2 or 3 for each clip and view.")
        return state[:, view] if state.ndim == 2 else state
    row = _view(tokens, view, 4)
    return np.array([ABSENT if np.isnan(row(at)).all() else PRESENT for at in range(len(tokens))], np.uint8)


def _reader(
    tokens: Any, state: np.ndarray, source: np.ndarray, view: int, shape: tuple[int, int]
) -> Callable[[np.ndarray], Iterator[Row]]:
    row = _view(tokens, view, 4)

    def read(rows: np.ndarray) -> Iterator[Row]:
        for at in source[rows].tolist():
            values = row(at).reshape(shape).astype(np.float32) if state[at] == PRESENT else None
            yield int(state[at]), values, "failed where the features were made" if state[at] == FAILED else ""

    return read


def import_logits(cache: Cache, foreign: ForeignFile, run: str) -> tuple[str, int]:
    """Take the logits of a foreign teacher; return its digest and the number of (clip, view) that have logits.

    run: the name by which `karmma distill --teacher` may call it.  Classes are put into the order of the table's;
    raises CacheError if one of them is missing, or the number does not fit where the file does not name them.
    """
    cache.add_clips(foreign.table)
    known = np.flatnonzero(foreign.rows >= 0)
    rows = cache.rows(foreign.table.clip_ids[foreign.rows[known]])
    logits = {}
    for head in foreign.table.heads:
        values = _head(foreign, head)[known]
        logits[head] = np.full((cache.n_clips, *values.shape[1:]), np.nan, np.float32)
        logits[head][rows] = values
    finite = np.all([np.isfinite(values).all(axis=2) for values in logits.values()], axis=0)
    for values in logits.values():
        values[~finite] = np.nan
    made_from = np.full(cache.n_clips, "", "<U8")
    made_from[rows] = table_digests(foreign.table)[foreign.rows[known]]
    content = hashlib.sha256(b"".join(np.ascontiguousarray(values).tobytes() for values in logits.values()))
    about = {"run": run, "inputs": {}, "tokens": {}, "imported": foreign.path.name}
    if "about" in foreign.dataset("logits").attrs:
        about = json.loads(foreign.dataset("logits").attrs["about"])
    about["classes"] = {head: list(foreign.table.classes(head)) for head in logits}
    about["teacher"] = about.get("teacher") or content.hexdigest()[:16]
    state = np.where(finite, PRESENT, UNWRITTEN)
    LogitStore.write(cache.logits_path(about["teacher"]), logits, state, made_from, about)
    return about["teacher"], int(finite.sum())


def _head(foreign: ForeignFile, head: str) -> np.ndarray:
    """Return the logits [rows of the file, V, classes of the table] of one head."""
    values = foreign.dataset(f"logits/{head}")[:].astype(np.float32)
    values = values[:, None] if values.ndim == 2 else values
    wanted = list(foreign.table.classes(head))
    names = wanted
    if f"classes/{head}" in foreign.file:
        names = [_text(value) for value in foreign.dataset(f"classes/{head}")[:]]
        for name in set(wanted) - set(names):
            raise CacheError(f"{foreign.path}: no logits of the {head} {name!r}. {nearest(name, names)}")
    if values.ndim != 3 or values.shape[::2] != (len(foreign.rows), len(names)):
        raise CacheError(
            f"{foreign.path}: logits/{head} is {list(values.shape)}, expected "
            f"[{len(foreign.rows)}, views, {len(names)}]. Name classes that are not the table's in classes/{head}."
        )
    return values[..., [names.index(name) for name in wanted]]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
