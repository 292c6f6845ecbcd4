"""Which shards are missing: the receipts held against the rows that the clip table asks for."""

from dataclasses import dataclass

import numpy as np

from ..data.annotations import ClipTable
from ..data.cache import Cache


@dataclass(frozen=True)
class ShardTask:
    """One shard of one modality and view, and what every row of it should hold afterwards.

    rows: cache rows [n] of the shard.  wanted: [n] digest of each row, '' for a row not requested in this view.
    fresh: [n] bool, True where the shard on disk has the row under the same digest, so it can be copied.
    """

    modality: str
    name: str
    view: int
    shard: int
    rows: np.ndarray
    wanted: tuple[str, ...]
    fresh: np.ndarray

    def is_due(self, at: int) -> bool:
        """Say whether the row at this place of the shard has to be computed."""
        return bool(self.wanted[at]) and not self.fresh[at]

    @property
    def n_due(self) -> int:
        """Rows to compute."""
        return sum(self.is_due(at) for at in range(len(self.rows)))


def plan_shards(
    cache: Cache, table: ClipTable, modality: str, name: str, *, n_views: int, shard_rows: int, retry_failed: bool
) -> list[ShardTask]:
    """List the shards of a token store whose receipt is missing or names other rows.

    Every clip of the table is due in view 0, training clips in all views; rows whose clip left the table stay.
    """
    digests, rows, tasks = cache.row_digests(), cache.rows(table.clip_ids), []
    for view in range(n_views):
        requested = np.zeros(cache.n_clips, bool)
        requested[rows if view == 0 else rows[table.split == "train"]] = True
        for shard in range(-(-cache.n_clips // shard_rows)):
            at = np.arange(shard * shard_rows, min((shard + 1) * shard_rows, cache.n_clips))
            receipt = cache.receipt(modality, name, view, shard) or {"rows": [], "failures": []}
            held = np.array((receipt["rows"] + [""] * len(at))[: len(at)])
            if retry_failed:
                held[[failure["row"] - at[0] for failure in receipt["failures"]]] = ""
            wanted = np.where(requested[at], digests[at], held)
            if (wanted != held).any():
                fresh = (held == wanted) & (wanted != "")
                tasks.append(ShardTask(modality, name, view, shard, at, tuple(wanted), fresh))
    return tasks
