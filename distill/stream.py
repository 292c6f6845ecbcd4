"""Raw clips for the student: read ahead by reader processes, kept decoded in memory and on disk while there is room."""

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
from ..data.decoded import DecodedClips
from ..data.errors import MediaError
from ..data.media import Reading
from ..data.modality import FAILED, PRESENT
from ..data.readers import ReaderPool, Readings

logger = logging.getLogger(__name__)
READ_AHEAD = 3


@dataclass(frozen=True)
class ClipBatch:
    """Raw arrays of B clips in one view.

    rows: [B] places in the clip table.  inputs: modality -> [n, ...] of the n clips that have it, in order.
    present: [B, M] bool, columns in the order of `modalities`.
    """

    rows: np.ndarray
    view: int
    modalities: tuple[str, ...]
    inputs: dict[str, Tensor]
    present: Tensor

    def parts(self, n: int) -> "list[ClipBatch]":
        """Cut the batch into n parts of nearly as many clips each; fewer if it has fewer clips."""
        found, last = [], 0
        before = torch.cat([self.present.new_zeros(1, len(self.modalities)).long(), self.present.cumsum(0)]).tolist()
        for rows in np.array_split(self.rows, min(n, len(self.rows)) or 1):
            first, last = last, last + len(rows)
            spans = zip(self.modalities, before[first], before[last], strict=True)
            inputs = {modality: self.inputs[modality][start:stop] for modality, start, stop in spans if start < stop}
            found.append(ClipBatch(rows, self.view, self.modalities, inputs, self.present[first:last]))
        return found


class ClipStream:
    """Reads the clips of a table as the views of `data` show them; used in a `with` block.

    A clip that fails is reported by name; more than `allow_failures` of them raise MediaError.  An allowed failure
    is a missing modality, and a clip with nothing left leaves its batch.  decoded: where clips may lie decoded already,
    and are kept.
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
        decoded: DecodedClips | None = None,
    ) -> None:
        self.table, self.data, self.modalities = table, data, tuple(modalities)
        self.allow_failures, self.decoded = allow_failures, decoded
        self.failed: dict[str, str] = {}
        self._ahead_clips = 4 * readers  # enough for every reader to have something to do while a step is taken
        self._room = cache_mb * 2**20
        self._held: dict[tuple[int, int, str], Reading] = {}
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
        n_ahead = max(READ_AHEAD, -(-self._ahead_clips // max(len(plan[0][0]), 1))) if plan else 0
        for at in range(len(plan) + n_ahead):
            if at < len(plan):
                ahead.append(self._asked(*plan[at], view))
            if at >= n_ahead:
                yield self._collate(plan[at - n_ahead][0], view, [read() for read in ahead.pop(0)])

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
            begun = {m: self.decoded.read(row, view, m) for m in asked if self.decoded and m not in held}
            stored = {modality: future for modality, future in begun.items() if future}
            rest = tuple(modality for modality in asked if modality not in held and modality not in stored)
            due.append((row, held, stored, bool(rest)))
            if rest:
                orders.append((self.table.clip(row), view, rest))
        futures = iter(self._pool.submit(orders))
        return [
            partial(self._received, row, view, held, stored, next(futures) if rest else None)
            for row, held, stored, rest in due
        ]

    def _received(
        self,
        row: int,
        view: int,
        held: dict[str, Reading],
        stored: dict[str, Future[np.ndarray | None]],
        rest: Future[Readings] | None,
    ) -> dict[str, Reading]:
        """Return the readings of a clip, and keep in memory and on disk what there is room for."""
        found = {modality: future.result() for modality, future in stored.items()}
        damaged = tuple(modality for modality, array in found.items() if array is None)
        again = self._pool.submit([(self.table.clip(row), view, damaged)])[0] if damaged else None
        read = {name: reading for future in (rest, again) if future for name, reading in future.result().items()}
        for modality, reading in read.items():
            if self.decoded is not None and reading.array is not None:
                self.decoded.keep(row, view, modality, reading.array)
        read |= {m: Reading(PRESENT, array) for m, array in found.items() if array is not None}
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
        present = np.array(states).reshape(len(rows), len(self.modalities)) == PRESENT
        failed = np.array([any(r.state == FAILED for r in found.values()) for found in readings], bool)
        kept = present.any(axis=1) | ~failed
        inputs = {}
        for column, modality in enumerate(self.modalities):
            there = (readings[at][modality].array for at in np.flatnonzero(present[:, column]))
            if arrays := [array for array in there if array is not None]:
                inputs[modality] = torch.from_numpy(np.stack(arrays))
        return ClipBatch(rows[kept], view, self.modalities, inputs, torch.from_numpy(present[kept]))

    def _note_failures(self, clip_id: str, found: dict[str, Reading]) -> None:
        for modality, reading in found.items():
            before, said = self.failed.get(clip_id, ""), f"{modality} failed"
            if reading.state != FAILED or said in before:
                continue
            self.failed[clip_id] = f"{before}{'; ' * bool(before)}{said}: {reading.reason.rstrip('.')}"
            self.require_few_failures()
            logger.warning("%s: %s failed and is treated as missing: %s", clip_id, modality, reading.reason)

    def require_few_failures(self) -> None:
        """Raise MediaError if more clips have failed than are allowed, and name the last one."""
        if len(self.failed) > self.allow_failures:
            clip_id, said = list(self.failed.items())[-1]
            raise MediaError(
                f"{clip_id}: {said}. Mend or remove the clip, or allow it to lack this modality with "
                f"--allow-failures {len(self.failed)}."
            )
