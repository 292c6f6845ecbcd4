"""The cached teacher: which one is meant, and its logits joined to clips by (clip, view)."""

from pathlib import Path
from typing import Any

import numpy as np

from ..data.annotations import ClipTable
from ..data.cache import Cache, table_digests
from ..data.config import DataConfig
from ..data.errors import CacheError, IncompleteCacheError, StaleCacheError, nearest
from ..data.identity import differences, input_identity
from ..data.modality import PRESENT
from ..data.selection import fitting_stores, n_missing
from ..data.stores import LogitStore
from .config import NO_TEACHER, StudentConfig


class CachedTeacher:
    """Logits of one teacher for the clips of a table; without a store, the paper's Baseline."""

    def __init__(self, store: LogitStore | None, cache_rows: np.ndarray) -> None:
        self.store, self.cache_rows = store, cache_rows
        self.n_views = store.n_views if store else 1

    @property
    def digest(self) -> str:
        """The teacher's digest, or 'none'."""
        return self.store.attributes["teacher"] if self.store else NO_TEACHER

    def require(self, rows: np.ndarray) -> None:
        """Raise IncompleteCacheError unless every table row has logits in every view."""
        for view in range(self.n_views if self.store else 0):
            missing = rows[~self.store.has(self.cache_rows[rows], view)]
            if len(missing):
                raise IncompleteCacheError(
                    f"{self.store.path}: {len(missing)} training clips have no logits in view "
                    f"{view}. Run karmma train-teacher again."
                )

    def logits(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray] | None:
        """Return logits head -> [n, N_h] of table rows in a view, None without a teacher; a gap raises."""
        return self.store.read(self.cache_rows[rows], view) if self.store else None


def find_teacher(cache: Cache | None, table: ClipTable, data: DataConfig, config: StudentConfig) -> CachedTeacher:
    """Return the teacher that config.teacher names, or the only one in the cache.

    Raises CacheError if there is none or several, StaleCacheError if it saw other inputs or classes than asked for.
    """
    if cache is None or config.teacher == NO_TEACHER:
        return CachedTeacher(None, np.arange(table.n_clips))
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
    store, rows = LogitStore.open(next(iter(names.values()))), cache.rows(table.clip_ids)
    _require_same(store, table, data)
    other = ~(store.is_made_from(rows, table_digests(table)) if rows.max() < store.n_clips else rows < store.n_clips)
    if other.any():
        raise StaleCacheError(
            f"{store.path}: {other.sum()} clip(s) are not those that this teacher saw, such as "
            f"{str(table.clip_ids[other][0])!r}: source or times changed. Extract and train the teacher again."
        )
    return CachedTeacher(store, rows)


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


def known_present(cache: Cache | None, table: ClipTable, data: DataConfig, config: StudentConfig) -> np.ndarray | None:
    """Return which of the student's modalities each clip has, present [N, M] bool; None unless the cache knows it.

    Raises IncompleteCacheError if more clips failed at extraction than config.allow_failures.
    """
    if cache is None:
        return None
    columns = []
    for modality in config.modalities or data.modalities:
        try:
            stores = fitting_stores(cache, modality, data)
        except StaleCacheError:  # a modality that the teacher has not seen either
            return None
        whole = [name for name in stores if n_missing(cache, table, modality, name) == 0]
        if not whole:
            return None
        cache.require_usable(modality, whole[0], table.clip_ids, config.allow_failures)
        columns.append(stores[whole[0]].state(cache.rows(table.clip_ids), 0) == PRESENT)
    return np.stack(columns, axis=1)
