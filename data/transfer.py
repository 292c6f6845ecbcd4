"""Rows of tokens taken over from elsewhere: another cache, another store of this one, or a file of features."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from .cache import Cache
from .drafts import ShardDraft, open_store, sound_shard
from .errors import CacheError
from .inventory import logit_names
from .modality import FAILED, PRESENT, UNWRITTEN
from .plan import ShardTask
from .publish import publish_json, read_json_files
from .stores import LogitStore, TokenStore

# A row as it is read: its state, its tokens [k, D] where present, and the reason where failed.
Row = tuple[int, np.ndarray | None, str]


def fill_rows(
    cache: Cache,
    store: TokenStore,
    place: tuple[str, str, int],
    asked: np.ndarray,
    read: Callable[[np.ndarray], Iterable[Row]],
    about: dict[str, Any],
) -> int:
    """Fill the rows of one view that a store lacks, shard by shard; return how many were taken.

    place: modality, digest and view.  asked: [N] digest of each row of the cache to be taken, '' for the others.
    read: given rows of the cache, ascending, returns them.  about: what receipts say of where they came from.
    Rows that are there under the same digest stay; failed ones among those asked for are taken anew.
    """
    receipts, n_taken = cache.valid_receipts(*place), 0
    with cache.leases() as leases:
        for shard, first in enumerate(range(0, len(asked), store.shard_rows)):
            part = tuple(asked[first : first + store.shard_rows].tolist())
            task = ShardTask(*place, shard, first, part, retry=True)
            if not task.due(receipts.get(shard)).any():
                continue
            with leases.waiting_for(task.lease):
                draft = ShardDraft(cache, store, task)
                (due,) = np.nonzero(draft.due)
                for at, (state, tokens, reason) in zip(due, read(first + due), strict=True):
                    draft.put(int(at), state, tokens, cache.clip_ids[first + at], reason)
                draft.publish(about)
                n_taken += len(due)
    return n_taken


class StoredRows:
    """Rows of one view of a token store, read shard by shard, each checked against its receipt."""

    def __init__(self, cache: Cache, modality: str, name: str, view: int) -> None:
        self.cache, self.store, self.view = cache, TokenStore.open(cache.tokens_path(modality, name)), view
        self.receipts = cache.valid_receipts(modality, name, view)
        self.reasons = {f["row"]: f["reason"] for receipt in self.receipts.values() for f in receipt["failures"]}
        self._shard = lru_cache(maxsize=2)(self._read_shard)

    def _read_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        return sound_shard(self.store, self.view, shard, self.receipts[shard])

    def read(self, rows: np.ndarray) -> Iterable[Row]:
        """Yield rows of the cache; raises CacheError if a shard is damaged."""
        for row in rows.tolist():
            shard, at = divmod(row, self.store.shard_rows)
            tokens, state = self._shard(shard)
            yield int(state[at]), tokens[at], self.reasons.get(row, "")

    def held(self) -> np.ndarray:
        """Return for every row [N] of the cache the digest under which the shards hold it, '' where they do not."""
        return self.cache.held_by(self.receipts.values())

    def states(self) -> np.ndarray:
        """Return the state [N] of every row of the cache; UNWRITTEN where there is no receipt."""
        out = np.full(self.cache.n_clips, UNWRITTEN, np.uint8)
        for shard, receipt in self.receipts.items():
            n = min(len(receipt["rows"]), self.cache.n_clips - receipt["first_row"])
            out[receipt["first_row"] :][:n] = self._shard(shard)[1][:n]
        return out


def merge(cache: Cache, other: Cache, advance: Callable[[int], object] = lambda n: None) -> dict[str, int]:
    """Take over every clip, shard and logit of another cache that this one lacks; return rows taken by store.

    Clips are joined by id: the other cache may have another order, or other clips.  A clip that both have, but from
    another source or other times, stays as it is here.  Raises CacheError if a shard of the other is damaged.
    """
    known = set(cache.clip_ids)
    new = [row for row, clip_id in enumerate(other.clip_ids) if clip_id not in known]
    cache.add_rows(*([values[row] for row in new] for values in (other.clip_ids, other.sources, other.labels)))
    taken: dict[str, int] = {}
    for (modality, name), identity in other.all_identities().items():
        if not other.n_views(modality, name):  # begun, no more
            continue
        theirs = TokenStore.open(other.tokens_path(modality, name))
        shape = (cache.n_clips, theirs.n_views, theirs.k, theirs.width)
        store = open_store(cache, modality, name, identity, shape, theirs.shard_rows)
        if (store.k, store.width) != (theirs.k, theirs.width):
            raise CacheError(f"{theirs.path}: tokens of {theirs.k} x {theirs.width}, here {store.k} x {store.width}.")
        for view in range(other.n_views(modality, name)):
            n = _merge_view(cache, store, other, (modality, name, view))
            taken[f"{modality}/{name}"] = taken.get(f"{modality}/{name}", 0) + n
            advance(1)
    for stem, record in read_json_files(other.path / "receipts" / "backbones").items():
        file = cache.path / "receipts" / "backbones" / f"{stem}.json"
        if record is not None and not file.exists():
            publish_json(file, record)
    for teacher in logit_names(other):
        if not (cache.logits_path(teacher) / "zarr.json").exists():
            taken[f"logits/{teacher}"] = _merge_logits(cache, other, teacher)
    return taken


def _merge_view(cache: Cache, store: TokenStore, other: Cache, place: tuple[str, str, int]) -> int:
    rows = StoredRows(other, *place)
    row_there = {clip_id: row for row, clip_id in enumerate(other.clip_ids)}
    source = np.array([row_there.get(clip_id, -1) for clip_id in cache.clip_ids])
    known = source >= 0
    offered = np.where(known, rows.held()[source], "")
    # A failure is no better than the one that is here already.
    useless = known & (rows.states()[source] == FAILED) & (cache.held(*place) == offered)
    asked = np.where((offered == cache.row_digests()) & ~useless, offered, "")
    return fill_rows(cache, store, place, asked, lambda at: rows.read(source[at]), {"merged_from": str(other.path)})


def _merge_logits(cache: Cache, other: Cache, name: str) -> int:
    """Take over the logits of a teacher whom this cache does not know; return the number of clips."""
    store = LogitStore.open(other.logits_path(name)).require_sound()
    rows = cache.rows(other.clip_ids[: store.n_clips])

    def moved(values: np.ndarray, empty: Any) -> np.ndarray:
        out = np.full((cache.n_clips, *values.shape[1:]), empty, values.dtype)
        out[rows] = values
        return out

    logits = {head: moved(store.values(head), np.nan) for head in store.heads}
    made_from = np.array([f"{number:08x}" if number else "" for number in moved(store.made_from, 0).tolist()])
    LogitStore.write(cache.logits_path(name), logits, moved(store.states, 0), made_from, store.attributes)
    return int((store.states == PRESENT).any(axis=1).sum())
