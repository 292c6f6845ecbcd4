"""A shard in the making: rows kept from the one that it supersedes, new rows, then one publication, receipt last."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from .cache import Cache
from .errors import CacheError
from .modality import FAILED, PRESENT, STATE_NAMES, UNWRITTEN
from .plan import ShardTask
from .stores import TokenStore


class ShardDraft:
    """One whole shard in memory: `tokens` [n, k, D] float16 and `state` [n], of which `due` [n] are to be made."""

    def __init__(self, cache: Cache, store: TokenStore, task: ShardTask) -> None:
        """Begin with what the shard on disk has; the caller holds the task's lease.

        Raises CacheError if the shard that rows would be kept of is damaged.
        """
        self.cache, self.store, self.task = cache, store, task
        receipt = cache.receipt(task.modality, task.name, task.view, task.shard)
        self.rows, self.due = task.wanted(receipt), task.due(receipt)
        n = len(self.rows)
        self.tokens = np.full((n, store.k, store.width), np.nan, np.float16)
        self.state = np.full(n, UNWRITTEN, np.uint8)
        kept = (self.rows != "") & ~self.due
        if kept.any():
            assert receipt is not None  # without one all rows are due
            tokens, state = sound_shard(store, task.view, task.shard, receipt)
            self.state[kept], self.tokens[kept] = state[:n][kept], tokens[:n][kept]
        old = receipt["failures"] if receipt else []
        self.failures = {f["row"]: f for f in old if not self.due[f["row"] - task.first_row]}

    def put(self, at: int, state: int, tokens: np.ndarray | None, clip_id: str, reason: str = "") -> None:
        """Fill the row at place `at` of the shard; tokens [k, D] where it is PRESENT.

        Values that are not finite, or that float16 cannot hold, make the clip FAILED: they are never written.
        """
        if state == PRESENT:
            assert tokens is not None  # which is what the state says
            with np.errstate(over="ignore"):
                self.tokens[at] = tokens
            if not np.isfinite(self.tokens[at]).all():
                state, reason = FAILED, _not_storable(tokens)
        if state != PRESENT:
            self.tokens[at] = np.nan
        if state == FAILED:
            row = self.task.first_row + at
            self.failures[row] = {"row": row, "clip_id": clip_id, "reason": reason}
        self.state[at] = state

    def publish(self, about: dict[str, Any]) -> None:
        """Write the shard and then its receipt; `about` is what the receipt says of the making."""
        task, key = self.task, (self.task.modality, self.task.name, self.task.view, self.task.shard)
        # Tokens and state are two files: between them, and the receipt, the shard must not seem to exist.
        self.cache.drop_receipt(*key)
        data, state = self.store.write_shard(task.shard, task.view, self.tokens, self.state)
        receipt = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "state_sha256": hashlib.sha256(state).hexdigest(),
            "first_row": task.first_row,
            "rows": self.rows.tolist(),
            "counts": dict(Counter(STATE_NAMES[state] for state in self.state.tolist() if state != UNWRITTEN)),
            "failures": [self.failures[row] for row in sorted(self.failures)],
            "versions": {name: version(name) for name in ("karmma", "torch", "av", "zarr")},
            **about,
        }
        self.cache.write_receipt(*key, receipt)


def open_store(
    cache: Cache, modality: str, name: str, identity: dict[str, Any], shape: tuple[int, int, int, int], shard_rows: int
) -> TokenStore:
    """Return the token store of an identity, made if it is new, with room for the clips and views of `shape`.

    shape: (N, V, k, D).  A store that is there keeps its k, D and clips a shard.  Nothing is written to one that has
    room, so that a complete cache may be read-only.
    """
    path = cache.tokens_path(modality, name)
    is_known = name in cache.identities(modality) and (path / "zarr.json").exists()
    if is_known and (store := TokenStore.open(path)).has_room(*shape[:2]):
        return store
    with cache.planning():
        if name not in cache.identities(modality):
            cache.write_identity(modality, name, identity)
        if not (path / "zarr.json").exists():
            TokenStore.create(path, shape, shard_rows, {"identity": identity})
        return TokenStore.open(path).grown(*shape[:2])


def sound_shard(store: TokenStore, view: int, shard: int, receipt: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [S, k, D] and state [S] of a shard whose bytes are those of its receipt; else raise CacheError."""
    data, state = store.read_shard(shard, view)
    for found, wanted in ((data, receipt["sha256"]), (state, receipt["state_sha256"])):
        if hashlib.sha256(found).hexdigest() != wanted:
            raise CacheError(
                f"{store.path}: shard {shard} of view {view} is not what its receipt says: damaged. "
                "Run karmma cache verify --drop, then karmma extract."
            )
    return store.decoded(data, state)


def _not_storable(tokens: np.ndarray) -> str:
    if np.isfinite(tokens).all():
        return f"its tokens reach {np.abs(tokens).max():.3g}, which float16 cannot hold. Scale them down"
    return f"{np.count_nonzero(~np.isfinite(tokens))} of its {tokens.size} token values are not finite"
