"""Accuracy by head and of whole actions, and how sure one can be of it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .losses import UNLABELLED

ACTION = "action"


def predictions(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return head -> [B] int64, the class of the largest logit, from head -> [B, N_h]."""
    return {head: scores.argmax(1) for head, scores in logits.items()}


def accuracy(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, float]:
    """Return head -> share of labelled clips predicted right, 0..1, and "action": right in every head.

    logits: head -> [B, N_h].  labels: head -> [B], -1 = unlabelled. An action counts over the clips labelled in all
    heads. A head that is itself called "action" keeps its own accuracy. NaN where no clip is labelled.
    Source: KARMMA sec. 4; EPIC-KITCHENS-100.
    """
    hits = {head: classes == labels[head] for head, classes in predictions(logits).items()}
    labelled = {head: labels[head] != UNLABELLED for head in logits}
    found = {head: _share(hits[head], labelled[head]) for head in logits}
    found.setdefault(ACTION, _share(_all(hits), _all(labelled)))
    return found


def topk_accuracy(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], k: int = 5) -> dict[str, float]:
    """Return head -> share of labelled clips whose class is among the k largest logits; NaN where none is labelled."""
    out = {}
    for head, scores in logits.items():
        best = scores.topk(min(k, scores.shape[1]), dim=1).indices  # [B, k]
        out[head] = _share((best == labels[head][:, None]).any(1), labels[head] != UNLABELLED)
    return out


def topk_action(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], k: int = 5) -> float:
    """Return the share of clips whose pair of classes is among the k likeliest, 0..1; NaN where none is labelled.

    logits: two heads -> [B, N_h]; the probability of a pair is the product of its two. Clips labelled in both heads
    count.  Raises ValueError unless there are two heads.  Source: EPIC-KITCHENS-100's top-5 of actions.
    """
    if len(logits) != 2:
        raise ValueError(f"Top-k of actions: {len(logits)} heads ({', '.join(logits)}), expected two.")
    # The k best of an outer product are pairs of the k best: whatever beats a class beats it in every pair.
    best = [scores.log_softmax(1).topk(min(k, scores.shape[1]), dim=1) for scores in logits.values()]
    pairs = best[0].values[:, :, None] + best[1].values[:, None, :]  # [B, k, k] log-probabilities
    hits = [found.indices == labels[head][:, None] for found, head in zip(best, logits, strict=True)]  # each [B, k]
    hit = (hits[0][:, :, None] & hits[1][:, None, :]).flatten(1)  # [B, k k]
    likeliest = pairs.flatten(1).topk(min(k, hit.shape[1]), dim=1).indices  # [B, k]
    return _share(hit.gather(1, likeliest).any(1), _all({head: labels[head] != UNLABELLED for head in logits}))


def majority(labels: Mapping[str, Tensor]) -> dict[str, float]:
    """Return head -> share of its commonest class among labelled clips, and "action": of the commonest combination.

    labels: head -> [B], -1 = unlabelled. No constant guess does better on these clips. NaN where none is labelled.
    """
    heads = torch.stack(list(labels.values()), dim=1)  # [B, heads]
    found = {head: _commonest(classes[:, None]) for head, classes in labels.items()}
    found.setdefault(ACTION, _commonest(heads))
    return found


def wilson_bounds(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the lower and upper bound of an accuracy of which `correct` of `n` clips were seen; z = 1.96: 95 percent.

    n = 0 gives (0, 1). Raises ValueError unless 0 <= correct <= n.  Source: Wilson, 1927.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"Wilson bounds: {correct} correct of {n} clips, expected 0 to {n}.")
    if n == 0:
        return 0.0, 1.0
    share, spread = correct / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _all(flags: Mapping[str, Tensor]) -> Tensor:
    """Return [B] bool: true in every head."""
    return torch.stack(list(flags.values())).all(0)


def _share(hit: Tensor, counted: Tensor) -> float:
    """Return the share of counted clips that are hit; NaN if none is counted."""
    n_counted = int(counted.sum())
    return int((hit & counted).sum()) / n_counted if n_counted else math.nan


def _commonest(classes: Tensor) -> float:
    """Return the share of the commonest row of [B, heads] among rows that are labelled throughout; NaN if none is."""
    classes = classes[(classes != UNLABELLED).all(1)]
    if not len(classes):
        return math.nan
    return int(classes.unique(dim=0, return_counts=True)[1].max()) / len(classes)
