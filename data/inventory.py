"""What a cache holds: its stores, how large and how complete they are, and which of them no run refers to."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .cache import Cache
from .errors import CacheError
from .modality import PRESENT
from .places import exists, place, sizes
from .publish import read_json, remove
from .runs import RunFolder
from .stores import LogitStore, TokenStore

LOGITS = "logits"


@dataclass(frozen=True)
class StoreInfo:
    """One store of a cache.

    kind: a modality, or 'logits'.  counts: (clip, view) pairs by state.  n_due: clips of the cache; n_current: those
    among them whose clean view is there, made from the clip as the table has it now.  n_bytes: on disk.
    """

    kind: str
    name: str
    made_from: str
    shape: tuple[int, ...]
    n_views: int
    n_due: int
    n_current: int
    n_bytes: int
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether every clip of the cache is there in the clean view."""
        return self.n_current == self.n_due

    def path(self, cache: Cache) -> Path:
        """Return where the store lies."""
        return cache.logits_path(self.name) if self.kind == LOGITS else cache.tokens_path(self.kind, self.name)


def take_inventory(cache: Cache) -> list[StoreInfo]:
    """List every store of a cache: tokens by modality, then logits."""
    known = cache.all_identities()
    names = [(modality, name) for modality in cache.modalities() for name in cache.store_names(modality)]
    tokens = [_tokens(cache, *key, known.get(key)) for key in names]
    return [*filter(None, tokens), *(_logits(cache, name) for name in logit_names(cache))]


def logit_names(cache: Cache) -> list[str]:
    """Return the teacher digests whose logits are in a cache."""
    return sorted(path.parent.name.removesuffix(".zarr") for path in (cache.path / "logits").glob("*.zarr/zarr.json"))


def _tokens(cache: Cache, modality: str, name: str, identity: dict[str, Any] | None) -> StoreInfo | None:
    path = cache.tokens_path(modality, name)
    if not (path / "zarr.json").exists():
        return None
    store = TokenStore.open(path)
    counts: Counter[str] = Counter()
    for view in range(cache.n_views(modality, name)):
        for receipt in cache.valid_receipts(modality, name, view).values():
            counts += Counter(receipt["counts"])
    n_current = int((cache.held(modality, name, 0) == cache.row_digests()).sum())
    n_bytes = sum(sizes(path).values()) + sum(sizes(cache.receipts(modality, name)).values())
    shape = (store.n_clips, store.n_views, store.k, store.width)
    made_from = _said(identity) if identity else "nobody knows: its identity is lost"
    n_clips, said = cache.n_clips, dict(counts)
    return StoreInfo(modality, name, made_from, shape, store.n_views, n_clips, n_current, n_bytes, said)


def _said(identity: dict[str, Any]) -> str:
    """Name in a few words what an identity was made from."""
    backbone, theta = identity["backbone"], identity["theta"]
    return f"{backbone['name']} ({backbone['weights'][:8]}), {identity['precision']}, theta {theta or 'none'}"


def _logits(cache: Cache, name: str) -> StoreInfo:
    store = LogitStore.open(cache.logits_path(name))
    rows = np.arange(min(store.n_clips, cache.n_clips))
    current = store.has(rows, 0) & store.is_made_from(rows, cache.row_digests()[rows])
    counts = {"present": int((store.states == PRESENT).sum())}
    classes = ", ".join(f"{head} {len(names)}" for head, names in store.attributes["classes"].items())
    n_bytes = sum(sizes(store.path).values())
    made_from = f"{store.attributes['run']}: {classes}"
    shape = (store.n_clips, store.n_views)
    return StoreInfo(LOGITS, name, made_from, shape, store.n_views, cache.n_clips, int(current.sum()), n_bytes, counts)


def unused(cache: Cache, stores: Iterable[StoreInfo], runs: Path) -> list[StoreInfo]:
    """Return the stores that no run folder in `runs` refers to, by what its config and its result say.

    Raises CacheError if there is no such folder or a run's file is damaged: nothing may be removed on their strength.
    """
    if not exists(place(runs)):  # else nothing would be in use
        raise CacheError(f"{runs}: no such folder, so nothing can be said to be unused. Name the folder with --runs.")
    used: set[str] = set()
    for config in place(runs).glob("*/config.json"):
        used |= _named_in(config)
        used |= _named_in(config.with_name("result.json")) if RunFolder(config.parent).is_finished else set()
    # What a teacher in use was trained from is in use.
    for store in stores:
        if store.kind == LOGITS and store.name in used:
            used |= {*LogitStore.open(store.path(cache)).attributes["tokens"].values()}
    return [store for store in stores if store.name not in used]


def _named_in(file: Path) -> set[str]:
    """Return the digests that a run's config or result names."""
    said = read_json(file)
    if isinstance(said, dict):
        tokens, teacher = said.get("tokens", {}), said.get("teacher", "")
        if isinstance(tokens, dict) and isinstance(teacher, str):
            return {*tokens.values(), teacher}
    raise CacheError(f"{file}: damaged, not what a run writes. Mend it, or remove the run's folder.")


def prune(cache: Cache, stores: Iterable[StoreInfo]) -> int:
    """Remove stores and their receipts; return the bytes that were freed.  Raises CacheError if it is not allowed."""
    freed = 0
    for store in stores:
        if store.kind != LOGITS:  # receipts first: a shard without one does not exist
            remove(cache.receipts(store.kind, store.name))
        remove(store.path(cache))
        freed += store.n_bytes
    return freed
