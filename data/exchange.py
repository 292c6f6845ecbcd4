"""Tokens and logits to and from HDF5: features from elsewhere train a teacher, a foreign teacher distils a student."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .cache import Cache, table_digests
from .config import digest
from .drafts import open_store
from .errors import CacheError, nearest
from .foreign import ForeignFile, logits_checksum, texts, tokens_checksum
from .identity import FORMAT
from .modality import ABSENT, FAILED, PRESENT, UNWRITTEN
from .publish import written_by
from .stores import LogitStore
from .transfer import Row, StoredRows, fill_rows

if TYPE_CHECKING:
    import h5py


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
            current = store.is_made_from(np.arange(store.n_clips), cache.row_digests()[: store.n_clips])
            for head in store.heads:
                values = np.where(current[:, None, None], store.values(head), np.float32(np.nan))
                group[head] = _whole(values, cache.n_clips)
                classes = list(map(str, store.attributes["classes"][head]))
                file.create_dataset(f"classes/{head}", data=classes, dtype=h5py.string_dtype())
            group.attrs["sha256"] = logits_checksum(file)
    return cache.n_clips


def _export_modality(cache: Cache, modality: str, name: str, file: "h5py.File") -> None:
    n_views = cache.n_views(modality, name)
    if not n_views:
        raise CacheError(f"{cache.path}: no shard of the {modality} tokens {name} is there. Run karmma extract.")
    views = [StoredRows(cache, modality, name, view) for view in range(n_views)]
    k, width = views[0].store.k, views[0].store.width
    shape, chunk = (cache.n_clips, n_views, k, width), (1, 1, k, width)
    tokens = file.create_dataset(f"tokens/{modality}", shape, "f2", chunks=chunk, fillvalue=np.nan)
    tokens.attrs["identity"] = json.dumps(cache.identities(modality)[name])
    digests = cache.row_digests()
    # A row that was made from other times than its clip has now is not there, for anybody who joins by clip id.
    current = [np.where(rows.held() == digests, rows.states(), np.uint8(UNWRITTEN)) for rows in views]
    state = file.create_dataset(f"state/{modality}", data=np.stack(current, axis=1))
    for view, rows in enumerate(views):
        (there,) = np.nonzero(state[:, view] == PRESENT)
        for row, (_, values, _) in zip(there.tolist(), rows.read(there), strict=True):
            tokens[row, view] = values
    tokens.attrs["sha256"] = tokens_checksum(file, modality)


def _whole(values: np.ndarray, n_clips: int) -> np.ndarray:
    """Return logits with a row of NaN for each clip that the cache has been given since."""
    return np.concatenate([values, np.full((n_clips - len(values), *values.shape[1:]), np.nan, values.dtype)])


def import_tokens(cache: Cache, foreign: ForeignFile, modality: str, shard_rows: int) -> tuple[str, int]:
    """Take the tokens of a modality into a store of their own; return its digest and the number of rows taken.

    The store of tokens that this package exported has its old identity again; any other is told by its content.
    Raises CacheError if the shape does not fit, a checksum fails, or values are too large for float16.
    """
    tokens = foreign.dataset(f"tokens/{modality}")
    fits = tokens.ndim in (2, 3, 4) and tokens.dtype.kind == "f" and len(tokens) == len(foreign.rows)
    if not fits or 0 in tokens.shape:
        raise CacheError(
            f"{foreign.path}: tokens/{modality} is {tokens.dtype} {list(tokens.shape)}, expected a float array "
            f"[{len(foreign.rows)}, views, k, D], or without views, or without views and k."
        )
    n_views = tokens.shape[1] if tokens.ndim == 4 else 1
    states = [_states(foreign, modality, tokens, view, n_views) for view in range(n_views)]
    cache.add_clips(foreign.table)
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
        state, held = states[view], cache.held(modality, name, view)
        offered = (source >= 0) & (state[source] != UNWRITTEN)
        # A failure is no better than the one that is here already.
        offered &= (state[source] != FAILED) | (held != digests)
        asked = np.where(offered, digests, "")
        read = _reader(tokens, state, source, view, (k, width))
        n_taken += fill_rows(cache, store, (modality, name, view), asked, read, {"imported_from": foreign.path.name})
    return name, n_taken


def _identity(foreign: ForeignFile, modality: str, tokens: "h5py.Dataset") -> dict[str, Any]:
    content = tokens_checksum(foreign.file, modality)
    if "identity" in tokens.attrs:
        if tokens.attrs.get("sha256") != content:
            raise CacheError(f"{foreign.path}: tokens/{modality} fails its checksum. Fetch or export the file again.")
        identity = json.loads(tokens.attrs["identity"])
        if not isinstance(identity, dict) or identity.get("modality") != modality:
            raise CacheError(f"{foreign.path}: tokens/{modality} have an identity of another kind. Export them again.")
        return identity
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


def _states(foreign: ForeignFile, modality: str, tokens: Any, view: int, n_views: int) -> np.ndarray:
    """Return the state [rows of the file] of a view; without states a row of NaN is absent."""
    if f"state/{modality}" in foreign.file:
        state = foreign.dataset(f"state/{modality}")[:]
        fits = state.shape in ((len(foreign.rows),), (len(foreign.rows), n_views))
        if not fits or not np.isin(state, (UNWRITTEN, PRESENT, ABSENT, FAILED)).all():
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
    known = np.flatnonzero(foreign.rows >= 0)
    found = {head: _head(foreign, head)[known] for head in foreign.table.heads}
    if len({values.shape[1] for values in found.values()}) > 1:
        said = ", ".join(f"logits/{head} {values.shape[1]}" for head, values in found.items())
        raise CacheError(f"{foreign.path}: heads differ in their number of views: {said}. Write the same of each.")
    if not np.all([np.isfinite(values).all(axis=2) for values in found.values()], axis=0).any():
        raise CacheError(f"{foreign.path}: logits of no clip of {foreign.table.path} are all there: NaN. Export again.")
    cache.add_clips(foreign.table)
    rows = cache.rows(foreign.table.clip_ids[foreign.rows[known]])
    logits = {}
    for head, values in found.items():
        logits[head] = np.full((cache.n_clips, *values.shape[1:]), np.nan, np.float32)
        logits[head][rows] = values
    finite = np.all([np.isfinite(values).all(axis=2) for values in logits.values()], axis=0)
    for values in logits.values():
        values[~finite] = np.nan
    made_from = np.full(cache.n_clips, "", "<U8")
    made_from[rows] = table_digests(foreign.table)[foreign.rows[known]]
    content = hashlib.sha256(b"".join(np.ascontiguousarray(values).tobytes() for values in logits.values()))
    about: dict[str, Any] = {"run": run, "inputs": {}, "tokens": {}, "imported": foreign.path.name}
    if "about" in foreign.group("logits").attrs:
        about = _about(foreign)
    about["classes"] = {head: list(foreign.table.classes(head)) for head in logits}
    about["teacher"] = about.get("teacher") or content.hexdigest()[:16]
    state = np.where(finite, PRESENT, UNWRITTEN)
    _require_nothing_lost(cache, about["teacher"], state)
    LogitStore.write(cache.logits_path(about["teacher"]), logits, state, made_from, about)
    return about["teacher"], int(finite.sum())


def _require_nothing_lost(cache: Cache, teacher: str, state: np.ndarray) -> None:
    """Raise CacheError if logits that are here would be gone once those with `state` [N, V] take their place."""
    path = cache.logits_path(teacher)
    if not (path / "zarr.json").exists():
        return
    here = np.argwhere(LogitStore.open(path).states == PRESENT)
    lost = [at for at in here.tolist() if at[1] >= state.shape[1] or state[tuple(at)] != PRESENT]
    if lost:
        clip_id = cache.clip_ids[lost[0][0]]
        raise CacheError(
            f"{path}: has logits of {len(lost)} (clip, view) that the file does not have, such as {clip_id}. "
            "Import into another cache, or with the table of all clips."
        )


def _about(foreign: ForeignFile) -> dict[str, Any]:
    """Return what this package said of the logits when it exported them: their digest names a folder of the cache."""
    try:
        about = json.loads(foreign.group("logits").attrs["about"])
    except ValueError as error:
        raise CacheError(f"{foreign.path}: what it says of its logits is damaged: {error}. Export again.") from None
    teacher = about.get("teacher") if isinstance(about, dict) else None
    if not isinstance(teacher, str) or not re.fullmatch("[0-9a-z]{16}", teacher):
        raise CacheError(f"{foreign.path}: names its teacher {teacher!r}, expected a digest. Export it again.")
    if foreign.group("logits").attrs.get("sha256") != logits_checksum(foreign.file):
        raise CacheError(f"{foreign.path}: its logits fail their checksum. Fetch or export the file again.")
    return about


def _head(foreign: ForeignFile, head: str) -> np.ndarray:
    """Return the logits [rows of the file, V, classes of the table] of one head."""
    dataset = foreign.dataset(f"logits/{head}")
    if dataset.dtype.kind not in "fiu":
        raise CacheError(f"{foreign.path}: logits/{head} is {dataset.dtype}, expected numbers.")
    with np.errstate(over="ignore"):
        values = dataset[:].astype(np.float32)
    if np.isinf(values).any():
        raise CacheError(f"{foreign.path}: logits/{head} has values that are infinite. Export it again.")
    values = values[:, None] if values.ndim == 2 else values
    wanted = list(foreign.table.classes(head))
    names = wanted
    if f"classes/{head}" in foreign.file:
        names = texts(foreign.dataset(f"classes/{head}"))
        for name in set(wanted) - set(names):
            raise CacheError(f"{foreign.path}: no logits of the {head} {name!r}. {nearest(name, names)}")
    if values.ndim != 3 or values.shape[::2] != (len(foreign.rows), len(names)):
        raise CacheError(
            f"{foreign.path}: logits/{head} is {list(values.shape)}, expected "
            f"[{len(foreign.rows)}, views, {len(names)}]. Name classes that are not the table's in classes/{head}."
        )
    return values[..., [names.index(name) for name in wanted]]
