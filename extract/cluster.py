"""The same shard tasks on a Dask cluster, of this machine or of many: only orders and receipts travel.

A worker is a process with one thread; it builds the backbones once and keeps them, its readers and its leases for as
long as it lives.  What was done is known from the receipts in the cache, so any other cluster can go on.
"""

import atexit
import json
import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import dask
import distributed
from distributed.comm import CommClosedError
from distributed.utils import LoopRunner

from ..data.config import DataConfig
from ..data.errors import ClusterError, one_line
from ..data.places import is_local
from ..data.plan import Order
from ..data.settings import rooted_backbone
from ..data.signals import deaf_to_interrupt
from .config import BackboneConfig, ExtractConfig
from .engine import Engine

# Seconds in which the first worker has to come.
WORKERS_S = 60
# Times that a shard is tried again that failed; one whose worker was lost is counted by Dask (allowed-failures).
RETRIES = 3
# What Dask says of its comings and goings is of no use beside our own line.
for _name in ("distributed", "distributed.client"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
# This worker's engine, by what it was built for; one order at a time, however many threads the worker has.
_kept: dict[tuple, Engine] = {}
_at_work = threading.Lock()


class Cluster:
    """A Dask scheduler and its workers; used in a `with` block like an Engine, and makes the same shards."""

    def __init__(self, data: DataConfig, config: ExtractConfig, names: dict[str, str]) -> None:
        """Name what is to be made."""
        self.config = config
        # Workers have a folder of their own.
        self.work = (_rooted(data).model_dump_json(), _rooted(config).model_dump_json(), tuple(names.items()))
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        # A worker that is silent for long computes: its shard is not given to another.
        quiet = {"distributed.scheduler.worker-ttl": None, "distributed.admin.tick.limit": "1h"}
        self._stack.enter_context(dask.config.set(quiet))
        try:
            address = self.config.scheduler or self._stack.enter_context(self._local())
            self.client = self._stack.enter_context(distributed.Client(address, timeout=30))
            self.client.wait_for_workers(1, timeout=WORKERS_S)
        except (OSError, TimeoutError, ValueError) as error:
            self._stack.close()
            raise ClusterError(
                f"scheduler = {self.config.scheduler!r}: cannot be reached: {error}. "
                "Start dask scheduler, and dask worker for it."
            ) from None
        return self

    def _local(self) -> distributed.LocalCluster:
        """Return a cluster of this machine, whose workers end with it and not by Ctrl-C."""
        loop = LoopRunner()
        with deaf_to_interrupt():
            loop.start()
        self._stack.callback(loop.stop)
        return distributed.LocalCluster(
            self.config.workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
            env={"DASK_LOGGING__DISTRIBUTED": "critical"},
            loop=loop.loop,
        )

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, orders: Iterable[Order], advance: Callable[[int], object]) -> list[Order]:
        """Do as `Engine.make`, by the workers.  Raises ClusterError if the scheduler is lost."""
        # Not pure: an order may have to be carried out twice, if somebody else held the lease.
        sent = [_sent(order) for order in orders]
        futures = self.client.map(make_order, sent, work=self.work, retries=RETRIES, pure=False)
        held: list[Order] = []
        try:
            for future in distributed.as_completed(futures):
                n_done, left = future.result()
                advance(n_done)
                held += left
                future.release()
        except (CommClosedError, TimeoutError, distributed.CancelledError, distributed.KilledWorker) as error:
            raise ClusterError(
                f"The cluster was lost: {one_line(error).rstrip('.')}. "
                "What was finished is kept; give the command again, on any cluster."
            ) from None
        finally:
            if self.client.status == "running":
                self.client.cancel(futures)
        return held


def make_order(order: Order, work: tuple[str, str, tuple]) -> tuple[int, list[Order]]:
    """Make one order in a worker; return how many (clip, modality) were done, and what others are making."""
    done: list[int] = []
    with _at_work:
        held = _engine(*work, _device()).make([order], done.append)
    return sum(done), held


def _engine(data: str, config: str, names: tuple[tuple[str, str], ...], device: str) -> Engine:
    """Return this worker's engine, which it keeps until it is asked for another."""
    key = (data, config, names, device)
    if key not in _kept:
        _let_go()
        chosen = ExtractConfig.model_validate(json.loads(config))
        if chosen.device == "auto" or (chosen.device == "cuda" and device != "auto"):
            chosen = chosen.model_copy(update={"device": device})
        _kept[key] = Engine(DataConfig.model_validate(json.loads(data)), chosen, dict(names)).__enter__()
    return _kept[key]


@atexit.register
def _let_go() -> None:
    while _kept:
        _kept.popitem()[1].__exit__()


def _device() -> str:
    """Return the device of this worker: one GPU each where this machine has several and nobody has dealt them out."""
    import torch

    name = distributed.get_worker().name
    n_devices = torch.cuda.device_count()
    return f"cuda:{name % n_devices}" if isinstance(name, int) and n_devices else "auto"


def _sent(order: Order) -> Order:
    """Return an order whose clips name local files by absolute paths."""
    clips = []
    for clip in order.clips:
        if clip is not None:
            sources = {name: path and _absolute(path) for name, path in clip.sources.items()}
            clip = replace(clip, video=_absolute(clip.video), sources=sources)
        clips.append(clip)
    return replace(order, clips=tuple(clips))


def _absolute(path: Path) -> Path:
    return path.absolute() if is_local(path) else path


def _rooted(model: Any) -> Any:
    """Return settings whose local paths are absolute."""
    changed = {}
    for name, value in model:
        if isinstance(value, Path):
            changed[name] = value.absolute()
        if isinstance(value, BackboneConfig):
            changed[name] = BackboneConfig(**rooted_backbone(value.model_dump(), Path.cwd()))
    return model.model_copy(update=changed)
