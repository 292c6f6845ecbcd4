"""What a cache holds: its stores, how large and how complete they are, and which of them no run refers to."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .cache import Cache
from .modality import PRESENT
from .places import place, sizes
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
    tokens = [_tokens(cache, *key, identity) for key, identity in cache.all_identities().items()]
    return [*filter(None, tokens), *(_logits(cache, name) for name in logit_names(cache))]


def logit_names(cache: Cache) -> list[str]:
    """Return the teacher digests whose logits are in a cache."""
    return sorted(path.parent.name.removesuffix(".zarr") for path in (cache.path / "logits").glob("*.zarr/zarr.json"))


def _tokens(cache: Cache, modality: str, name: str, identity: dict[str, Any]) -> StoreInfo | None:
    path = cache.tokens_path(modality, name)
    if not (path / "zarr.json").exists():
        return None
    store, counts = TokenStore.open(path), Counter()
    for view in range(cache.n_views(modality, name)):
        for receipt in cache.valid_receipts(modality, name, view).values():
            counts += Counter(receipt["counts"])
    n_current = int((cache.held(modality, name, 0) == cache.row_digests()).sum())
    n_bytes = sum(sizes(path).values()) + sum(sizes(cache.receipts(modality, name)).values())
    shape = (store.n_clips, store.n_views, store.k, store.width)
    return StoreInfo(modality, name, _said(identity), shape, store.n_views, cache.n_clips, n_current, n_bytes, counts)


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
    return StoreInfo(
        LOGITS, name, made_from, shape, store.n_views, cache.n_clips, int(current.sum()), n_bytes, counts
    )


def unused(cache: Cache, stores: Iterable[StoreInfo], runs: Path) -> list[StoreInfo]:
    """Return the stores that no run folder in `runs` refers to, by what its config and its result say.

    Raises CacheError if a run's file is damaged: nothing may be removed on the strength of it.
    """
    used: set[str] = set()
    for config in place(runs).glob("*/config.json"):
        run = RunFolder(config.parent)
        used |= {*run.config.get("tokens", {}).values(), str(run.config.get("teacher"))}
        used |= {str(read_json(run.path / "result.json").get("teacher"))} if run.is_finished else set()
    # What a teacher in use was trained from is in use.
    for store in stores:
        if store.kind == LOGITS and store.name in used:
            used |= {*LogitStore.open(store.path(cache)).attributes["tokens"].values()}
    return [store for store in stores if store.name not in used]


def prune(cache: Cache, stores: Iterable[StoreInfo]) -> int:
    """Remove stores and their receipts; return the bytes that were freed.  Raises CacheError if it is not allowed."""
    freed = 0
    for store in stores:
        if store.kind != LOGITS:  # receipts first: a shard without one does not exist
            remove(cache.receipts(store.kind, store.name))
        remove(store.path(cache))
        freed += store.n_bytes
    return freed
