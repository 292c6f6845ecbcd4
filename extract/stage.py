"""Fill the cache: find the shards that are not there yet, and hand only those to the engine.

Nothing here imports torch or timm: a cache that is complete is found to be so in well under a second.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.annotations import ClipTable
from ..data.cache import Cache
from ..data.config import DataConfig, digest
from ..data.drafts import open_store
from ..data.errors import CacheError
from ..data.identity import token_identity
from ..data.modality import STATE_NAMES
from ..data.plan import ShardTask, plan_orders, plan_shards
from ..data.progress import watched
from ..data.stores import TokenStore
from .config import ExtractConfig
from .weights import backbone_request, recorded_backbone

if TYPE_CHECKING:
    from .cluster import Cluster
    from .engine import Engine

# Seconds until shards that another process is making are looked at again.
LOOK_AGAIN_S = 2.0


@dataclass
class ExtractReport:
    """What an extraction found and did, by modality; all counts are of (clip, view) pairs.

    agreement: the least and mean cosine of sampled bfloat16 tokens to float32; empty for float32.
    """

    cache: Path
    stores: dict[str, Path] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    n_written: int = 0

    @property
    def n_failed(self) -> int:
        """Failed (clip, view) pairs over all modalities, earlier runs included."""
        return sum(counts["failed"] for counts in self.counts.values())


def extract_tokens(table: ClipTable, data: DataConfig, config: ExtractConfig) -> ExtractReport:
    """Make the cache hold the tokens of every clip of the table, for each of data.read_modalities.

    Recomputes nothing that has a receipt.  Returns what is there now; failed clips are counted in it, not raised.
    Raises CacheError if the cache cannot be written or a shard that would be extended is damaged.
    """
    data.require_read()
    cache = Cache(data.cache)
    report = ExtractReport(cache.path, changes=cache.add_clips(table))
    stores = open_stores(cache, data, config)
    tasks: dict[ShardTask, int] = {}
    for modality, store in stores.items():
        tasks |= _due(cache, table, modality, store.path.stem, config)
    if tasks:
        report.n_written = _make(cache, table, tasks, data, config)
    cache.sweep()
    for modality, store in stores.items():
        name = store.path.stem
        report.stores[modality] = store.path
        report.counts[modality] = _counted(cache, table, store.path, config.views)
        report.failures[modality] = cache.failures(modality, name, table.clip_ids)
        report.agreement |= _agreement(cache, modality, name)
    return report


def plan_extraction(table: ClipTable, data: DataConfig, config: ExtractConfig) -> dict[str, int]:
    """Return how many (clip, view) pairs of each modality `extract_tokens` would make; nothing is written."""
    cache, due = Cache(data.cache), {}
    cache.foresee_clips(table)
    for modality in data.require_read():
        record, name = recorded_backbone(cache, backbone_request(modality, data, config)), "of a backbone never met"
        if record:
            name = digest(token_identity(modality, data, record["backbone"], config.theta, config.precision))
        due[modality] = sum(_due(cache, table, modality, name, config).values())
    return due


def _due(cache: Cache, table: ClipTable, modality: str, name: str, config: ExtractConfig) -> dict[ShardTask, int]:
    """Return the shards that this part of an extraction has to make."""
    sizes = {"n_views": config.views, "shard_rows": config.shard_rows}
    tasks = plan_shards(cache, table, modality, name, **sizes, retry=config.retry_failed)
    return {task: n for task, n in tasks.items() if _is_ours(task, config.part)}


def open_stores(cache: Cache, data: DataConfig, config: ExtractConfig) -> dict[str, TokenStore]:
    """Return the token store of each modality, made if it is new, with room for every clip and view of the cache.

    Raises CacheError if one is there with another number of clips a shard.
    """
    known = {m: recorded_backbone(cache, backbone_request(m, data, config)) for m in data.require_read()}
    made: dict[str, dict[str, Any]] = {}
    if None in known.values():
        # Only building a backbone tells the digest of its weights, the first time they are met.
        from .frozen import record_backbones

        made = record_backbones(cache, [m for m, record in known.items() if record is None], data, config)
    stores = {}
    for modality, recorded in known.items():
        record = recorded or made[modality]
        identity = token_identity(modality, data, record["backbone"], config.theta, config.precision)
        stores[modality] = _opened(cache, modality, identity, record["shape"], config)
    return stores


def _opened(
    cache: Cache, modality: str, identity: dict[str, Any], shape: tuple[int, int], config: ExtractConfig
) -> TokenStore:
    name, (n_tokens, width) = digest(identity), shape
    whole = (cache.n_clips, config.views, min(n_tokens, config.theta or n_tokens), width)
    store = open_store(cache, modality, name, identity, whole, config.shard_rows)
    if store.shard_rows != config.shard_rows:
        raise CacheError(
            f"{store.path}: has {store.shard_rows} clips a shard, asked for {config.shard_rows}. "
            "Leave --shard-rows as it was."
        )
    return store


def _is_ours(task: ShardTask, part: str) -> bool:
    i, n = map(int, part.split("/"))
    return (task.shard + task.view) % n == i - 1


def _make(cache: Cache, table: ClipTable, tasks: dict[ShardTask, int], data: DataConfig, config: ExtractConfig) -> int:
    """Have all tasks made, here or on a cluster; what other processes are making is waited for.

    Returns the number of (clip, view, modality) that were not made by them.
    """
    names = {task.modality: task.name for task in tasks}
    orders = plan_orders(cache, table, tasks)
    with watched("extract", sum(tasks.values()), "clips") as progress:
        with _maker(data, config, names) as maker:
            while orders := maker.make(orders, progress.advance):
                progress.advance(0, f"{len(orders)} shards are being made by another process")
                time.sleep(LOOK_AGAIN_S)
        return progress.done


def _maker(data: DataConfig, config: ExtractConfig, names: dict[str, str]) -> "Cluster | Engine":
    if config.scheduler or config.workers > 1:
        from .cluster import Cluster

        return Cluster(data, config, names)
    from .engine import Engine

    return Engine(data, config, names)


def _counted(cache: Cache, table: ClipTable, path: Path, n_views: int) -> Counter[str]:
    """Count the states of the table's clips over all views; clips that left the table do not count."""
    store, rows = TokenStore.open(path), cache.rows(table.clip_ids)
    states = np.concatenate([store.state(rows, view) for view in range(n_views)])
    return Counter({name: int((states == state).sum()) for state, name in STATE_NAMES.items()})


def _agreement(cache: Cache, modality: str, name: str) -> dict[str, dict[str, float]]:
    """Return what receipts say of bfloat16 held against float32, if anything."""
    views = range(cache.n_views(modality, name))
    receipts = [receipt for view in views for receipt in cache.valid_receipts(modality, name, view).values()]
    found = [receipt["float32_check"] for receipt in receipts if receipt.get("float32_check")]
    if not found:
        return {}
    least, mean = min(check["least"] for check in found), min(check["mean"] for check in found)
    return {modality: {"least": least, "mean": mean}}
