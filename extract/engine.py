"""Run the frozen backbones over the shards that are missing: one task, one shard, one atomic publish."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from importlib.metadata import version
from itertools import groupby
from typing import Any

import numpy as np
import torch

from ..data.annotations import ClipTable
from ..data.cache import Cache
from ..data.config import DataConfig
from ..data.device import choose_device
from ..data.errors import CacheError
from ..data.identity import tensors_digest
from ..data.media import Reading
from ..data.modality import FAILED, PRESENT, STATE_NAMES, UNWRITTEN
from ..data.progress import Task, watched
from ..data.publish import sweep
from ..data.readers import ReaderPool
from ..data.stores import TokenStore
from ..data.theta import theta_average
from .backbones import Backbone, build_backbone
from .config import ExtractConfig
from .plan import ShardTask
from .weights import backbone_request, record_backbone

# Clips handed to the readers together: enough for neighbours of one video to meet, few enough to stay in memory.
WINDOW_CLIPS = 16
READ_AHEAD = 2


def build_frozen(modality: str, data: DataConfig, config: ExtractConfig) -> Backbone:
    """Return a modality's backbone in evaluation mode, without gradients."""
    chosen = getattr(config, modality)
    backbone = build_backbone(chosen.name, modality, data.input_shape(modality), chosen.weights, config.seed)
    return backbone.eval().requires_grad_(False)


def record_backbones(cache: Cache, modalities: list[str], data: DataConfig, config: ExtractConfig) -> None:
    """Build backbones met for the first time and record the digests of their weights."""
    for modality in modalities:
        backbone = build_frozen(modality, data, config)
        found = {"name": getattr(config, modality).name, "weights": tensors_digest(backbone.state_dict())}
        record_backbone(cache, backbone_request(modality, data, config), found)


def run_tasks(
    cache: Cache,
    table: ClipTable,
    tasks: list[ShardTask],
    identities: dict[str, dict[str, Any]],
    data: DataConfig,
    config: ExtractConfig,
) -> None:
    """Compute and publish every task; tasks of one shard and view share one reading of each clip."""
    by_shard = sorted(tasks, key=lambda task: (task.shard, task.view))
    total = sum(task.n_due for task in tasks)
    with ReaderPool(config.readers, data) as readers, watched("extract", total, "clips") as progress:
        engine = Engine(cache, table, tasks, data, config, readers)
        engine.open_stores(identities)
        for _, together in groupby(by_shard, key=lambda task: (task.shard, task.view)):
            engine.run(list(together), progress)


class Engine:
    """The backbones, stores and readers of one extraction."""

    def __init__(
        self,
        cache: Cache,
        table: ClipTable,
        tasks: list[ShardTask],
        data: DataConfig,
        config: ExtractConfig,
        readers: ReaderPool,
    ) -> None:
        self.cache, self.table, self.data, self.config, self.readers = cache, table, data, config, readers
        self.device = choose_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.names = {task.modality: task.name for task in tasks}
        self.backbones = {m: build_frozen(m, data, config).to(self.device) for m in self.names}
        self.table_row = {clip_id: row for row, clip_id in enumerate(table.clip_ids)}
        self.stores: dict[str, TokenStore] = {}

    def open_stores(self, identities: dict[str, dict[str, Any]]) -> None:
        """Create each store, or give it room for new clips and views, under the planner's lock."""
        with self.cache.planning():
            sweep(self.cache.path)
            for modality, name in self.names.items():
                path, backbone = self.cache.tokens_path(modality, name), self.backbones[modality]
                kept = min(backbone.n_tokens, self.config.theta or backbone.n_tokens)
                if name not in self.cache.identities(modality):
                    self.cache.write_identity(modality, name, identities[modality])
                if not (path / "zarr.json").exists():
                    shape = (self.cache.n_clips, self.config.views, kept, backbone.width)
                    TokenStore.create(path, shape, self.config.shard_rows, {"identity": identities[modality]})
                self.stores[modality] = TokenStore.open(path).grown(self.cache.n_clips, self.config.views)
                if self.stores[modality].shard_rows != self.config.shard_rows:
                    raise CacheError(
                        f"{path}: has {self.stores[modality].shard_rows} clips a shard, asked for "
                        f"{self.config.shard_rows}. Leave --shard-rows as it was."
                    )

    def run(self, tasks: list[ShardTask], progress: Task) -> None:
        """Fill one shard and view of one or more modalities."""
        start = time.time()
        drafts = {task.modality: _Draft(task, self.stores[task.modality]) for task in tasks}
        for readings in self._read(tasks):
            for modality, draft in drafts.items():
                mine = {at: found[modality] for at, found in readings.items() if modality in found}
                draft.take(mine, self._tokens(modality, mine))
                progress.advance(sum(draft.task.is_due(at) for at in mine))
        for draft in drafts.values():
            draft.publish(self.cache, time.time() - start, self.config)

    def _slots(self, tasks: list[ShardTask]) -> list[dict[int, tuple[str, ...]]]:
        """Cut a shard into batches: place in the shard -> modalities to read there.

        The cut is the same whatever is already there, since the last bits of a result depend on the batch it was
        computed in: a batch with one row missing is computed whole.
        """
        size, slots = self.config.batch_size, []
        for start in range(0, len(tasks[0].rows), size):
            places = range(start, min(start + size, len(tasks[0].rows)))
            due = [task for task in tasks if any(task.is_due(at) for at in places)]
            slot = {at: tuple(t.modality for t in due if self._readable(t, at)) for at in places}
            slots.append({at: modalities for at, modalities in slot.items() if modalities})
        return [slot for slot in slots if slot]

    def _readable(self, task: ShardTask, at: int) -> bool:
        return bool(task.wanted[at]) and self.cache.clip_ids[task.rows[at]] in self.table_row

    def _read(self, tasks: list[ShardTask]) -> Iterator[dict[int, dict[str, Reading]]]:
        """Yield the readings of each batch; some windows of batches are read ahead, each video of one in one pass."""
        slots, view = self._slots(tasks), tasks[0].view
        n_slots = max(1, WINDOW_CLIPS // self.config.batch_size)
        windows = [slots[at : at + n_slots] for at in range(0, len(slots), n_slots)]
        waiting: list[list[dict[int, Future]]] = []
        for window in [*windows, *[[]] * READ_AHEAD]:
            asked = {at: modalities for slot in window for at, modalities in slot.items()}
            clips = [self.table.clip(self.table_row[self.cache.clip_ids[tasks[0].rows[at]]]) for at in asked]
            orders = [(clip, view, names) for clip, names in zip(clips, asked.values(), strict=True)]
            futures = dict(zip(asked, self.readers.submit(orders), strict=True))
            waiting.append([{at: futures[at] for at in slot} for slot in window])
            for slot in waiting.pop(0) if len(waiting) > READ_AHEAD else ():
                yield {at: future.result() for at, future in slot.items()}

    @torch.inference_mode()
    def _tokens(self, modality: str, readings: dict[int, Reading]) -> dict[int, np.ndarray]:
        """Return place -> tokens [k, D] float16 for the readings that are present."""
        places = [at for at, reading in readings.items() if reading.state == PRESENT]
        if not places:
            return {}
        batch = torch.from_numpy(np.stack([readings[at].array for at in places])).to(self.device)
        tokens = self.backbones[modality](batch)
        if self.config.theta:
            tokens = theta_average(tokens, self.config.theta)
        return dict(zip(places, tokens.float().cpu().numpy(), strict=True))


class _Draft:
    """A shard being made: its tokens, states and failures, published in one go."""

    def __init__(self, task: ShardTask, store: TokenStore) -> None:
        self.task, self.store, self.failures = task, store, []
        n = len(task.rows)
        self.tokens = np.full((n, store.k, store.width), np.nan, np.float16)
        self.state = np.full(n, UNWRITTEN, np.uint8)
        if task.fresh.any():
            kept = np.flatnonzero(task.fresh)
            self.state[kept] = store.state(task.rows[kept], task.view)
            self.tokens[kept] = store.read_written(task.rows[kept], task.view)

    def take(self, readings: dict[int, Reading], tokens: dict[int, np.ndarray]) -> None:
        """Put the results of one batch in their places; values that float16 cannot hold make a clip failed."""
        for at, reading in readings.items():
            if not self.task.is_due(at):
                continue  # here to fill its batch; what the cache has of it stays, even if its file is gone by now
            self.state[at], reason = reading.state, reading.reason
            if reading.state == PRESENT:
                with np.errstate(over="ignore"):
                    self.tokens[at] = tokens[at]
                if not np.isfinite(self.tokens[at]).all():
                    self.state[at] = FAILED
                    reason = f"its tokens reach {np.abs(tokens[at]).max():.3g}, which float16 cannot hold"
            if self.state[at] != PRESENT:
                self.tokens[at] = np.nan
            if self.state[at] == FAILED:
                self.failures.append((at, reason))

    def publish(self, cache: Cache, seconds: float, config: ExtractConfig) -> None:
        """Write the shard, then its receipt."""
        task = self.task
        # Tokens and state are two files: between them, and the receipt, the shard must not seem to exist.
        old = (cache.receipt(task.modality, task.name, task.view, task.shard) or {"failures": []})["failures"]
        cache.drop_receipt(task.modality, task.name, task.view, task.shard)
        path, data = self.store.write_shard(task.shard, task.view, self.tokens, self.state)
        redone = {at for at, _ in self.failures}
        kept = [f for f in old if (at := f["row"] - int(task.rows[0])) not in redone and self.state[at] == FAILED]
        new = [
            {"row": int(task.rows[at]), "clip_id": cache.clip_ids[task.rows[at]], "reason": reason}
            for at, reason in self.failures
        ]
        receipt = {
            "file": str(path.relative_to(cache.path)),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "first_row": int(task.rows[0]),
            "rows": list(task.wanted),
            "counts": dict(Counter(STATE_NAMES[int(state)] for state in self.state if state != UNWRITTEN)),
            "failures": sorted(kept + new, key=lambda failure: failure["row"]),
            "versions": {name: version(name) for name in ("karmma", "torch", "av", "zarr")},
            "threads": torch.get_num_threads(),
            "batch_size": config.batch_size,
            "seconds": round(seconds, 2),
        }
        cache.write_receipt(task.modality, task.name, task.view, task.shard, receipt)
