"""Fill shards: reading, the backbones and writing overlap; one task, one shard, one atomic publication.

Clips are read ahead in processes of their own, the backbones run in this thread, and finished shards are encoded,
checksummed and written by another, while the next ones are under way.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

import torch

from ..data.annotations import Clip
from ..data.cache import Cache
from ..data.config import DataConfig
from ..data.device import choose_device, enough_memory
from ..data.drafts import ShardDraft
from ..data.media import Reading
from ..data.plan import Order
from ..data.readers import ReaderPool, Readings
from ..data.stores import TokenStore
from .config import ExtractConfig
from .frozen import FrozenBackbone, build_frozen
from .weights import require_identity

logger = logging.getLogger(__name__)
# Clips handed to the readers together: enough for neighbours of one video to meet, few enough to stay in memory.
WINDOW_CLIPS = 16
READ_AHEAD = 2

Slot = dict[int, tuple[str, ...]]  # place in the shard -> modalities to read there; one batch


@dataclass
class _Shard:
    """An order under way: a draft for each modality that is due, and how many batches are still to come."""

    order: Order
    drafts: dict[str, ShardDraft]
    n_slots: int = 0
    start: float = field(default_factory=time.monotonic)

    @property
    def clips(self) -> Sequence[Clip | None]:
        """The clip at each place."""
        return self.order.clips

    def clip(self, at: int) -> Clip:
        """Return the clip at a place where something is due."""
        clip = self.order.clips[at]
        assert clip is not None  # `slots` leaves out the others
        return clip

    def slots(self, size: int) -> list[Slot]:
        """Cut the shard into batches of `size` places, and leave out those where nothing is due."""
        slots = []
        for first in range(0, len(self.clips), size):
            places = [at for at in range(first, min(first + size, len(self.clips))) if self.clips[at]]
            slot = {at: tuple(m for m, draft in self.drafts.items() if draft.due[at]) for at in places}
            slots.append({at: modalities for at, modalities in slot.items() if modalities})
        return [slot for slot in slots if slot]


class Engine:
    """Backbones, stores, readers and leases of one process; used in a `with` block."""

    def __init__(self, data: DataConfig, config: ExtractConfig, names: dict[str, str]) -> None:
        """Build what `names` (modality -> digest of the store) needs.

        Raises CacheError if what is built here, or how clips are read here, is not what a store was made from.
        """
        self.cache, self.data, self.config = Cache(data.cache), data, config
        self.device = choose_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.stores = {m: TokenStore.open(self.cache.tokens_path(m, name)) for m, name in names.items()}
        self.backbones = {}
        for modality, name in names.items():
            backbone = build_frozen(modality, data, config)
            require_identity(self.cache, modality, name, backbone, data, config)
            self.backbones[modality] = FrozenBackbone(modality, backbone, config, self.device)
        build_frozen.cache_clear()
        self._stack = ExitStack()
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        self.leases = self._stack.enter_context(self.cache.leases())
        self.writer = self._stack.enter_context(ThreadPoolExecutor(1, "writer"))
        self.readers = self._stack.enter_context(ReaderPool(self.config.readers, self.data))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, orders: Iterable[Order], advance: Callable[[int], object]) -> list[Order]:
        """Make every shard that nobody else is making; return the orders that somebody is.

        advance: called with the number of (clip, modality) that were done.  Raises CacheError if the disk is full or
        read-only, MemoryShortError if there is not enough memory; what was finished stays.
        """
        held: list[Order] = []
        try:
            with enough_memory("extraction", "Lower --batch-size, --shard-rows or --readers."):
                self._make(orders, advance, held)
        finally:
            self._let_go()
        return held

    def _make(self, orders: Iterable[Order], advance: Callable[[int], object], held: list[Order]) -> None:
        for shard, slot, readings in self._read(self._begun(orders, held)):
            for modality, draft in shard.drafts.items():
                mine = {at: readings[at].result()[modality] for at, names in slot.items() if modality in names}
                self._put(shard, draft, mine)
                advance(len(mine))
            shard.n_slots -= 1
            if not shard.n_slots:
                self._published()  # the one before: at most one waits in memory to be written
                self._last = self.writer.submit(self._publish, shard, held)
        self._published()

    def _let_go(self) -> None:
        """After an error, let others make what was begun, and a later call begin anew."""
        if self._last is not None:
            wait([self._last])
            self._last = None
        self.leases.give_back_all()

    def _begun(self, orders: Iterable[Order], held: list[Order]) -> Iterator[tuple[_Shard, list[Slot]]]:
        """Yield windows of batches of one shard after another, each begun when its turn to be read has come."""
        n = max(1, WINDOW_CLIPS // self.config.batch_size)
        for order in orders:
            free = [task for task in order.tasks if self.leases.take(task.lease)]
            if len(free) < len(order.tasks):
                held.append(Order(tuple(task for task in order.tasks if task not in free), order.clips))
            drafts = {task.modality: ShardDraft(self.cache, self.stores[task.modality], task) for task in free}
            shard = _Shard(order, {m: draft for m, draft in drafts.items() if draft.due.any()})
            for modality in drafts.keys() - shard.drafts.keys():  # somebody has made it meanwhile
                self.leases.give_back(drafts[modality].task.lease)
            slots = shard.slots(self.config.batch_size)
            shard.n_slots = len(slots)
            for at in range(0, len(slots), n):
                yield shard, slots[at : at + n]

    def _read(
        self, windows: Iterator[tuple[_Shard, list[Slot]]]
    ) -> Iterator[tuple[_Shard, Slot, dict[int, Future[Readings]]]]:
        """Yield batch after batch with its readings; some windows are read ahead, each video of one in one pass."""
        waiting: deque[tuple[_Shard, list[Slot], dict[int, Future[Readings]]]] = deque()
        for shard, slots in windows:
            asked = {at: modalities for slot in slots for at, modalities in slot.items()}
            view = next(iter(shard.drafts.values())).task.view
            wanted = [(shard.clip(at), view, modalities) for at, modalities in asked.items()]
            waiting.append((shard, slots, dict(zip(asked, self.readers.submit(wanted), strict=True))))
            if len(waiting) > READ_AHEAD:
                shard, slots, futures = waiting.popleft()
                yield from ((shard, slot, futures) for slot in slots)
        for shard, slots, futures in waiting:
            yield from ((shard, slot, futures) for slot in slots)

    def _put(self, shard: _Shard, draft: ShardDraft, readings: dict[int, Reading]) -> None:
        """Run the backbone over the clips of one batch that are there, and put all of them into the draft."""
        size = self.config.batch_size
        arrays = {at % size: reading.array for at, reading in readings.items() if reading.array is not None}
        tokens = self.backbones[draft.task.modality].tokens(arrays)
        for at, reading in readings.items():
            draft.put(at, reading.state, tokens.get(at % size), shard.clip(at).clip_id, reading.reason)

    def _publish(self, shard: _Shard, held: list[Order]) -> None:
        """Write the shard in every modality whose lease is still held, then let the leases go."""
        for modality, draft in shard.drafts.items():
            if self.leases.is_held(draft.task.lease):
                draft.publish(
                    {
                        "float32_check": self.backbones[modality].agreement,
                        "device": str(self.device),
                        "threads": torch.get_num_threads(),
                        "batch_size": self.config.batch_size,
                        "seconds": round(time.monotonic() - shard.start, 2),
                    }
                )
                self.leases.give_back(draft.task.lease)
            else:
                logger.warning("%s: was away for so long that another process has taken it over", draft.task.lease)
                held.append(Order((draft.task,), shard.order.clips))

    def _published(self) -> None:
        """Wait for the shard that is being written; raises what went wrong there."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()
