"""Which shards are to be made: the rows that a clip table asks for, held against the receipts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from .annotations import Clip, ClipTable
from .cache import Cache


@dataclass(frozen=True)
class ShardTask:
    """One shard of one modality and view, and the rows that are asked for in it.

    asked: digest of each row from `first_row` on, '' for one that is not asked for.  retry: try failed rows again.
    """

    modality: str
    name: str
    view: int
    shard: int
    first_row: int
    asked: tuple[str, ...]
    retry: bool = False

    @property
    def lease(self) -> str:
        """Name of the lease that whoever makes the shard holds."""
        return f"{self.modality}/{self.name}/view{self.view}-{self.shard}"

    def wanted(self, receipt: Mapping[str, Any] | None) -> np.ndarray:
        """Return the digest [n] of each row once the task is done: the one asked for, else the one that is there.

        receipt: of the shard as it is.  It may hold rows that another process has added behind those asked for.
        """
        held = self._held(receipt)
        asked = np.array(_filled(self.asked, len(held)))
        return np.where(asked != "", asked, held)

    def due(self, receipt: Mapping[str, Any] | None) -> np.ndarray:
        """Say for each row [n] of `wanted` whether it has to be made."""
        held, wanted = self._held(receipt), self.wanted(receipt)
        due = (wanted != "") & (held != wanted)
        if receipt and self.retry:
            asked_again = [failure["row"] - self.first_row for failure in receipt["failures"]]
            due[[at for at in asked_again if at < len(self.asked) and self.asked[at]]] = True
        return due

    def _held(self, receipt: Mapping[str, Any] | None) -> np.ndarray:
        rows = receipt["rows"] if receipt else ()
        return np.array(_filled(rows, len(self.asked)))


def _filled(digests: Sequence[str], n: int) -> list[str]:
    return [*digests, *[""] * (n - len(digests))]


@dataclass(frozen=True)
class Order:
    """One shard and view, to be made in one or more modalities that share one reading of each clip.

    clips: of each place in the shard, None where the table does not have it.
    """

    tasks: tuple[ShardTask, ...]
    clips: tuple[Clip | None, ...]


def plan_shards(
    cache: Cache, table: ClipTable, modality: str, name: str, *, n_views: int, shard_rows: int, retry: bool = False
) -> dict[ShardTask, int]:
    """Return the shards of a token store that lack rows, and how many each lacks.

    Every clip of the table is due in view 0, training clips in all views; rows whose clip left the table stay.
    """
    digests, rows, tasks = cache.row_digests(), cache.rows(table.clip_ids), {}
    for view in range(n_views):
        asked = np.full(cache.n_clips, "", "<U8")
        due = rows if view == 0 else rows[table.split == "train"]
        asked[due] = digests[due]
        receipts = cache.valid_receipts(modality, name, view)
        for shard, first in enumerate(range(0, cache.n_clips, shard_rows)):
            part = tuple(asked[first : first + shard_rows].tolist())
            task = ShardTask(modality, name, view, shard, first, part, retry)
            n_due = int(task.due(receipts.get(shard)).sum())
            if n_due:
                tasks[task] = n_due
    return tasks


def plan_orders(cache: Cache, table: ClipTable, tasks: Iterable[ShardTask]) -> list[Order]:
    """Put tasks of one shard and view together, with the clips of their rows."""
    row_of = {clip_id: row for row, clip_id in enumerate(table.clip_ids.tolist())}
    orders = []
    for _, group in groupby(sorted(tasks, key=_place), key=_place):
        together = tuple(group)
        first, n = together[0].first_row, len(together[0].asked)
        rows = [row_of.get(clip_id) for clip_id in cache.clip_ids[first : first + n]]
        orders.append(Order(together, tuple(None if row is None else table.clip(row) for row in rows)))
    return orders


def _place(task: ShardTask) -> tuple[int, int]:
    return task.shard, task.view
