"""The cached teacher: which one is meant, and its logits joined to clips by (clip, view)."""

from pathlib import Path
from typing import Any

import numpy as np

from ..data.annotations import ClipTable
from ..data.cache import Cache, table_digests
from ..data.config import DataConfig
from ..data.errors import CacheError, ConfigError, IncompleteCacheError, StaleCacheError, nearest
from ..data.identity import differences, input_identity
from ..data.modality import PRESENT
from ..data.selection import fitting_stores, n_missing, n_whole_views
from ..data.stores import LogitStore, TokenStore
from .config import NO_TEACHER, StudentConfig


class CachedTeacher:
    """Logits of one teacher for the clips of a table; without a store, the paper's Baseline."""

    def __init__(self, store: LogitStore | None, cache_rows: np.ndarray, n_views: int = 1) -> None:
        """cache_rows: [N] of the table, -1 for clips that nobody asks for.  n_views: of a student without teacher."""
        self.store, self.cache_rows = store, cache_rows
        self.n_views = store.n_views if store else n_views

    @property
    def digest(self) -> str:
        """The teacher's digest, or 'none'."""
        return self.store.attributes["teacher"] if self.store else NO_TEACHER

    def require(self, rows: np.ndarray) -> None:
        """Raise IncompleteCacheError unless the teacher was asked about every table row in every view."""
        if self.store is None:
            return
        for view in range(self.n_views):
            n_missing = int((~self.store.is_written(self.cache_rows[rows], view)).sum())
            if n_missing:
                foreign = "imported" in self.store.attributes
                mend = "Import logits of all training clips" if foreign else "Run karmma train-teacher again"
                raise IncompleteCacheError(
                    f"{self.store.path}: {n_missing} training clips have no logits in view {view}. {mend}."
                )

    def speaks(self, rows: np.ndarray, view: int) -> np.ndarray:
        """Say for each table row [n] whether the teacher has logits: none without any of its modalities."""
        return self.store.has(self.cache_rows[rows], view) if self.store else np.zeros(len(rows), bool)

    def logits(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return logits head -> [n, N_h] of table rows in a view; a gap raises IncompleteCacheError."""
        assert self.store is not None  # nobody asks for what `speaks` denies
        return self.store.read(self.cache_rows[rows], view)


def find_teacher(cache: Cache | None, table: ClipTable, data: DataConfig, config: StudentConfig) -> CachedTeacher:
    """Return the teacher that config.teacher names, or the only one in the cache.

    Raises CacheError if there is none or several, StaleCacheError if it saw other inputs or classes than asked for.
    """
    if config.teacher == NO_TEACHER:
        views = config.views or (known_views(cache, table, data, config) if cache else 1)
        return CachedTeacher(None, np.arange(table.n_clips), views)
    assert cache is not None  # whoever wants a teacher has opened it
    store, train = _chosen(cache, config), table.rows("train")
    _require_same(store, table, data)
    if config.views not in (0, store.n_views):
        raise ConfigError(
            f"views is {config.views}, but {store.path} has {store.n_views}: a student sees the teacher's. Drop it."
        )
    rows = np.full(table.n_clips, -1)
    rows[train] = cache.rows(table.clip_ids[train])
    known = train[store.has(rows[train], 0)]
    other = known[~store.is_made_from(rows[known], table_digests(table)[known])]
    if len(other):
        raise StaleCacheError(
            f"{store.path}: {len(other)} clip(s) are not those that this teacher saw, such as "
            f"{str(table.clip_ids[other[0]])!r}: source or times changed. Extract and train the teacher again."
        )
    return CachedTeacher(store, rows)


def _chosen(cache: Cache, config: StudentConfig) -> LogitStore:
    """Return the logits that config.teacher names, or the only ones there are; raises CacheError."""
    names = {path.stem: path for path in sorted((cache.path / "logits").glob("*.zarr"))}
    if config.teacher is not None:
        wanted = Path(config.teacher).name
        names = {
            name: path for name, path in names.items() if wanted in (name, LogitStore.open(path).attributes["run"])
        }
        if not names:
            raise CacheError(
                f"{cache.path}: no logits of a teacher {config.teacher!r}. "
                f"{nearest(wanted, [path.stem for path in (cache.path / 'logits').glob('*.zarr')])}"
            )
    if not names:
        raise CacheError(
            f"{cache.path}: no teacher here. Run karmma train-teacher --cache {cache.path}, "
            "or distill with --teacher none."
        )
    if len(names) > 1:
        raise CacheError(
            f"{cache.path}: {len(names)} teachers here: {', '.join(_named(names))}. Choose one with --teacher."
        )
    return LogitStore.open(next(iter(names.values()))).require_sound()


def _named(names: dict[str, Path]) -> list[str]:
    return [f"{name} ({LogitStore.open(path).attributes['run']})" for name, path in names.items()]


def _require_same(store: LogitStore, table: ClipTable, data: DataConfig) -> None:
    """Refuse a teacher that saw the clips otherwise than the student would."""
    wanted: dict[str, Any] = {head: list(table.classes(head)) for head in data.heads}
    said = differences(store.attributes["classes"], wanted, "classes.")
    for modality, found in store.attributes["inputs"].items():
        if "imported" not in found:  # features made elsewhere: nobody here can say from what
            said += differences(found, input_identity(modality, data), f"{modality}.")
    if said:
        raise StaleCacheError(
            f"{store.path}: this teacher saw other clips: {'; '.join(said)}. "
            "Train a teacher under these settings, or use the teacher's."
        )


def known_views(cache: Cache, table: ClipTable, data: DataConfig, config: StudentConfig) -> int:
    """Return how many views of every training clip the cache has, in all of the student's modalities; at least 1.

    So a student without teacher sees the same views as one with it.
    """
    found = []
    for modality in config.modalities_of(data):
        whole = _whole_stores(cache, table, modality, data).values()
        found.append(max((n_whole_views(cache, table, modality, store) for store in whole), default=1))
    return max(1, min(found))


def known_present(
    cache: Cache | None, table: ClipTable, data: DataConfig, config: StudentConfig
) -> tuple[np.ndarray, dict[str, str]] | None:
    """Return which of the student's modalities each clip has, present [N, M] bool, and the clips that failed.

    None unless the cache knows it.  Raises IncompleteCacheError if more clips failed at extraction than
    config.allow_failures; of a student without teacher the cache is no judge, and such clips are read again.
    """
    if cache is None:
        return None
    columns: list[np.ndarray] = []
    failed: dict[str, str] = {}
    for modality in config.modalities_of(data):
        whole = _whole_stores(cache, table, modality, data)
        if not whole:
            return None
        name, store = next(iter(whole.items()))
        if config.teacher == NO_TEACHER and cache.failures(modality, name, table.clip_ids):
            return None
        failures = cache.require_usable(modality, name, table.clip_ids, config.allow_failures)
        failed |= {clip_id: f"{modality} failed: {reason}" for clip_id, reason in failures.items()}
        columns.append(store.state(cache.rows(table.clip_ids), 0) == PRESENT)
    return np.stack(columns, axis=1), failed


def _whole_stores(cache: Cache, table: ClipTable, modality: str, data: DataConfig) -> dict[str, TokenStore]:
    """Return by digest the stores of these inputs that have the clean view of every clip; there may be none."""
    try:
        stores = fitting_stores(cache, modality, data)
        return {name: store for name, store in stores.items() if n_missing(cache, table, modality, name) == 0}
    except (StaleCacheError, IncompleteCacheError):  # of other settings, or of other clips
        return {}
