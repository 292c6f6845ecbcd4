"""Raw clips for the student: read ahead by reader processes, kept decoded in memory while there is room."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..data.annotations import ClipTable
from ..data.config import DataConfig
from ..data.errors import MediaError
from ..data.media import Reading
from ..data.modality import FAILED, PRESENT
from ..data.readers import ReaderPool

logger = logging.getLogger(__name__)
READ_AHEAD = 3


@dataclass(frozen=True)
class ClipBatch:
    """Raw arrays of B clips in one view.

    rows: [B] places in the clip table.  inputs: modality -> [n, ...] of the n clips that have it, in order.
    present: [B, M] bool, columns in the order of the stream's modalities.
    """

    rows: np.ndarray
    view: int
    inputs: dict[str, Tensor]
    present: Tensor


class ClipStream:
    """Reads the clips of a table as the views of `data` show them; used in a `with` block.

    A clip that fails is reported by name; more than `allow_failures` of them raise MediaError.  An allowed failure
    is a missing modality, and a clip with nothing left leaves its batch.
    """

    def __init__(
        self,
        table: ClipTable,
        data: DataConfig,
        modalities: Sequence[str],
        *,
        readers: int = 2,
        cache_mb: int = 0,
        allow_failures: int = 0,
    ) -> None:
        self.table, self.data, self.modalities = table, data, tuple(modalities)
        self.readers, self.allow_failures = readers, allow_failures
        self.failed: dict[str, str] = {}
        self._room, self._held = cache_mb * 2**20, {}
        self._pool = ReaderPool(readers, data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def batches(self, plan: Sequence[tuple[np.ndarray, np.ndarray]], view: int) -> Iterator[ClipBatch]:
        """Yield one batch for each (rows [B], wanted [B, M] bool) of the plan, in order.

        What is not wanted is neither decoded nor returned; what is wanted but absent is not `present`.
        """
        ahead: list[list[Callable[[], dict[str, Reading]]]] = []
        for at in range(len(plan) + READ_AHEAD):
            if at < len(plan):
                ahead.append(self._asked(*plan[at], view))
            if at >= READ_AHEAD:
                yield self._collate(plan[at - READ_AHEAD][0], view, [read() for read in ahead.pop(0)])

    def survey(self, rows: np.ndarray, count: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """Read the clean view of every row once and return which modalities it has: present [n, M] bool."""
        wanted = np.ones((len(rows), len(self.modalities)), bool)
        found = np.zeros_like(wanted)
        place = {int(row): at for at, row in enumerate(rows)}
        for batch in self.batches([(rows[at : at + 8], wanted[at : at + 8]) for at in range(0, len(rows), 8)], 0):
            found[[place[int(row)] for row in batch.rows]] = batch.present.numpy()
            count(len(batch.rows))
        return found

    def _asked(self, rows: np.ndarray, wanted: np.ndarray, view: int) -> list[Callable[[], dict[str, Reading]]]:
        """Ask for the wanted modalities of a batch; return for each clip what waits for its readings."""
        due, orders = [], []
        for row, wants in zip(rows.tolist(), wanted, strict=True):
            asked = [modality for modality, want in zip(self.modalities, wants, strict=True) if want]
            held = {m: self._held[row, view, m] for m in asked if (row, view, m) in self._held}
            rest = tuple(modality for modality in asked if modality not in held)
            due.append((row, held, bool(rest)))
            if rest:
                orders.append((self.table.clip(row), view, rest))
        futures = iter(self._pool.submit(orders))
        return [partial(self._received, row, view, held, next(futures) if rest else None) for row, held, rest in due]

    def _received(self, row: int, view: int, held: dict[str, Reading], rest: Future | None) -> dict[str, Reading]:
        """Return the readings of a clip, and keep in memory what there is room for."""
        read = rest.result() if rest else {}
        for modality, reading in read.items():
            size = 0 if reading.array is None else reading.array.nbytes
            if reading.state != FAILED and size <= self._room:
                self._room -= size
                self._held[row, view, modality] = reading
        return held | read

    def _collate(self, rows: np.ndarray, view: int, readings: list[dict[str, Reading]]) -> ClipBatch:
        for row, found in zip(rows, readings, strict=True):
            self._note_failures(str(self.table.clip_ids[row]), found)
        states = [[found[m].state if m in found else 0 for m in self.modalities] for found in readings]
        present = np.array(states).reshape(len(rows), -1) == PRESENT
        kept = present.any(axis=1) | ~np.array([any(r.state == FAILED for r in found.values()) for found in readings])
        inputs = {}
        for column, modality in enumerate(self.modalities):
            arrays = [readings[at][modality].array for at in np.flatnonzero(present[:, column])]
            if arrays:
                inputs[modality] = torch.from_numpy(np.stack(arrays))
        return ClipBatch(rows[kept], view, inputs, torch.from_numpy(present[kept]))

    def _note_failures(self, clip_id: str, found: dict[str, Reading]) -> None:
        for modality, reading in found.items():
            if reading.state != FAILED or clip_id in self.failed:
                continue
            self.failed[clip_id] = reading.reason
            if len(self.failed) > self.allow_failures:
                raise MediaError(
                    f"{clip_id}: {modality} failed: {reading.reason}. Mend or remove the clip, or allow "
                    f"it to lack this modality with --allow-failures {len(self.failed)}."
                )
            logger.warning("%s: %s failed and is treated as missing: %s", clip_id, modality, reading.reason)
