"""Splits: the paper's pruned validation, and a part of the training clips held out for validation."""

import hashlib
from collections import Counter

import numpy as np

from .annotations import ClipTable
from .config import DataConfig
from .errors import TableError


def prune(table: ClipTable) -> ClipTable:
    """Return an EPIC-KITCHENS table without the val and test clips whose noun no training clip has.

    Other tables come back unchanged; unlabelled clips stay.  Source: KARMMA sec. 4, Datasets (four nouns, 24 clips).
    """
    if not table.is_pruned or "noun" not in table.heads:
        return table
    nouns = np.array([noun or "" for noun in table.arrow.column("noun").to_pylist()])
    is_train = table.split == "train"
    gone = ~is_train & (nouns != "") & ~np.isin(nouns, nouns[is_train])
    if not gone.any():
        return table
    left = sorted({*nouns[gone].tolist()})
    named = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
    note = f"Left out {gone.sum()} clips of {len(left)} nouns never trained ({named}). Set prune = false to keep them."
    return table.kept(~gone, note)


def hold_out(table: ClipTable, data: DataConfig) -> ClipTable:
    """Move data.holdout_share of the training clips to val: EPIC* of the paper for holdout = 'clips'.

    'clips': round(share * n) clips in proportion over the combinations of labels, never the last one of a label.
    'videos': whole videos, until the share is reached.  The same for any order of rows.
    Raises TableError if there is a validation split already.  Source: KARMMA sec. 4, Datasets.
    """
    if (table.split == "val").any():
        raise TableError(f"{table.path}: has a split val already. Set holdout to none, or make these clips train.")
    rows = table.rows("train")
    chosen = _some_clips(table, rows, data) if data.holdout == "clips" else _some_videos(table, rows, data)
    split = table.split.astype("<U5")
    split[chosen] = "val"
    return table.resplit(split, f"Held out {len(chosen)} of {len(rows)} training clips for validation.")


def _hashed(data: DataConfig, name: str) -> bytes:
    return hashlib.sha256(f"{data.holdout_seed}/{name}".encode()).digest()


def _some_clips(table: ClipTable, rows: np.ndarray, data: DataConfig) -> list[int]:
    columns = [table.arrow.column(head).to_pylist() for head in table.heads]
    labels = {int(row): tuple(column[row] or "" for column in columns) for row in rows}
    order = sorted(labels, key=lambda row: (labels[row], _hashed(data, str(table.clip_ids[row]))))
    n_chosen = round(data.holdout_share * len(order))
    left = Counter(pair for found in labels.values() for pair in enumerate(found))
    chosen: dict[int, None] = {}
    for i in range(n_chosen):
        place = int((i + 0.5) * len(order) / n_chosen)
        # The clip at this place of the sorted row, or the next one that leaves each of its labels something to train.
        for step in range(len(order)):
            row = order[(place + step) % len(order)]
            pairs = [*enumerate(labels[row])]
            if row not in chosen and all(left[pair] > 1 for pair in pairs):
                chosen[row] = None
                left.subtract(pairs)
                break
    return sorted(chosen)


def _some_videos(table: ClipTable, rows: np.ndarray, data: DataConfig) -> list[int]:
    name = "video_id" if "video_id" in table.arrow.column_names else "video"
    videos = table.arrow.column(name).to_pylist()
    by_video: dict[str, list[int]] = {}
    for row in rows.tolist():
        by_video.setdefault(videos[row], []).append(row)
    chosen: list[int] = []
    for video in sorted(by_video, key=lambda video: _hashed(data, video)):
        if len(chosen) >= data.holdout_share * len(rows):
            break
        chosen += by_video[video]
    return sorted(chosen)
