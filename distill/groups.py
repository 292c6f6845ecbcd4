"""Which clips of a split count where: all, those of seen and of unseen participants, and those of rare classes."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..data.annotations import ClipTable
from ..fuse.metrics import ACTION, labelled

TAIL_SHARE = 0.2  # of the training clips, which the tail classes have together at most


def groups(table: ClipTable, rows: np.ndarray, labels: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return group -> head -> [n] bool, and "action": whether a clip counts there; groups without a clip are left out.

    labels: head -> [n] of the rows, -1 = unlabelled.  'unseen': participants that no training clip has, or that the
    data set names; 'seen': the other named ones.  'tail': clips of a rare class of the head, for the action of either.
    Source: EPIC-KITCHENS-100 (Damen et al., 2022), whose own lists are used where the table has them.
    """
    counted = labelled(labels)
    found = {"all": counted}
    named = table.participants()
    unseen = np.isin(named, sorted(table.unseen or {*named} - {*named[table.split == "train"]} - {""}))
    who = torch.from_numpy(unseen[rows])
    known = torch.from_numpy((named != "")[rows])
    if who.any():
        found["seen"] = {name: clips & known & ~who for name, clips in counted.items()}
        found["unseen"] = {name: clips & known & who for name, clips in counted.items()}
    rare = {head: torch.from_numpy(_is_rare(table, head)[rows]) for head in labels}
    either = torch.stack(list(rare.values())).any(0)
    found["tail"] = {name: clips & rare.get(name, either) for name, clips in counted.items()}
    return {name: each for name, each in found.items() if name == "all" or each[ACTION].any()}


def _is_rare(table: ClipTable, head: str) -> np.ndarray:
    """Say for each row of the table [N] whether its class is one of the smallest that together train on a fifth."""
    labels, classes = table.labels(head), table.classes(head)
    if table.tail.get(head):
        return np.isin(labels, [index for index, name in enumerate(classes) if name in table.tail[head]])
    train = labels[(table.split == "train") & (labels >= 0)]
    counts = np.bincount(train, minlength=len(classes))
    smallest = np.argsort(counts, kind="stable")
    rare = smallest[np.cumsum(counts[smallest]) <= TAIL_SHARE * len(train)]
    return np.isin(labels, rare)
