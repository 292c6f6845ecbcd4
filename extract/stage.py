"""Fill the cache: find the shards that are not there yet, and hand only those to the engine.

Nothing here imports torch or timm: a cache that is complete is found to be so in well under a second.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.annotations import ClipTable
from ..data.cache import Cache
from ..data.config import DataConfig, digest
from ..data.identity import token_identity
from ..data.modality import STATE_NAMES
from ..data.stores import TokenStore
from .config import ExtractConfig
from .plan import ShardTask, plan_shards
from .weights import backbone_request, recorded_backbone


@dataclass
class ExtractReport:
    """What an extraction found and did, by modality; all counts are of (clip, view) pairs."""

    cache: Path
    stores: dict[str, Path] = field(default_factory=dict)
    counts: dict[str, Counter] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    n_written: int = 0

    @property
    def n_failed(self) -> int:
        """Failed (clip, view) pairs over all modalities, earlier runs included."""
        return sum(counts["failed"] for counts in self.counts.values())


def extract_tokens(table: ClipTable, data: DataConfig, config: ExtractConfig) -> ExtractReport:
    """Make the cache hold the tokens of every clip of the table, for each of data.modalities.

    Recomputes nothing that has a receipt.  Returns what is there now; failed clips are counted in it, not raised.
    """
    cache = Cache(data.cache)
    report = ExtractReport(cache.path, changes=cache.add_clips(table))
    identities = {m: _identity(cache, m, data, config) for m in data.modalities}
    if any(fields is None for fields in identities.values()):
        # Only building a backbone tells the digest of its weights, the first time they are met.
        from .engine import record_backbones

        record_backbones(cache, [m for m, fields in identities.items() if fields is None], data, config)
        identities = {m: _identity(cache, m, data, config) for m in data.modalities}
    tasks = [task for m, fields in identities.items() for task in _tasks(cache, table, m, fields, config)]
    if tasks:
        from .engine import run_tasks

        run_tasks(cache, table, tasks, identities, data, config)
    for modality, fields in identities.items():
        name = digest(fields)
        if name not in cache.identities(modality):  # a store that was made just before the power went
            cache.write_identity(modality, name, fields)
        report.stores[modality] = cache.tokens_path(modality, name)
        report.counts[modality] = _counted(cache, table, report.stores[modality], config.views)
        report.failures[modality] = cache.failures(modality, name, table.clip_ids)
    report.n_written = sum(task.n_due for task in tasks)
    return report


def _identity(cache: Cache, modality: str, data: DataConfig, config: ExtractConfig) -> dict[str, Any] | None:
    backbone = recorded_backbone(cache, backbone_request(modality, data, config))
    return backbone and token_identity(modality, data, backbone, config.theta, config.precision)


def _tasks(
    cache: Cache, table: ClipTable, modality: str, fields: dict[str, Any], config: ExtractConfig
) -> list[ShardTask]:
    plan = {"n_views": config.views, "shard_rows": config.shard_rows, "retry_failed": config.retry_failed}
    return plan_shards(cache, table, modality, digest(fields), **plan)


def _counted(cache: Cache, table: ClipTable, path: Path, n_views: int) -> Counter:
    """Count the states of the table's clips over all views; clips that left the table do not count."""
    store, rows = TokenStore.open(path), cache.rows(table.clip_ids)
    states = np.concatenate([store.state(rows, view) for view in range(n_views)])
    return Counter({name: int((states == state).sum()) for state, name in STATE_NAMES.items()})
