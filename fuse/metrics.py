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


def labelled(labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return head -> [B] bool, and "action": labelled in all heads.  labels: head -> [B], -1 = unlabelled."""
    found = {head: classes != UNLABELLED for head, classes in labels.items()}
    found.setdefault(ACTION, _all(found))
    return found


def topk_hits(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], k: int = 1) -> dict[str, Tensor]:
    """Return head -> [B] bool, whether a clip's class is among the k largest logits, and "action": its combination.

    logits: head -> [B, N_h].  labels: head -> [B]. The probability of a combination is the product of those of its
    classes. A head that is itself called "action" keeps its own.  Source: EPIC-KITCHENS-100's top-5 of actions.
    """
    best = {head: scores.log_softmax(1).topk(min(k, scores.shape[1]), dim=1) for head, scores in logits.items()}
    own = {head: found.indices == labels[head][:, None] for head, found in best.items()}  # each [B, k]
    first = next(iter(logits.values()))
    likely, right = first.new_zeros(len(first), 1), torch.ones_like(first[:, :1], dtype=torch.bool)
    for head, found in best.items():
        # The k best of an outer product are pairs of the k best: whatever beats a class beats it in every pair.
        pairs = (likely[:, :, None] + found.values[:, None, :]).flatten(1)  # [B, k k] log-probabilities
        right = (right[:, :, None] & own[head][:, None, :]).flatten(1)
        likely, places = pairs.topk(min(k, pairs.shape[1]), dim=1)
        right = right.gather(1, places)
    return {ACTION: right.any(1), **{head: hit.any(1) for head, hit in own.items()}}


def accuracy(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], k: int = 1) -> dict[str, float]:
    """Return head -> share of labelled clips predicted right, 0..1, and "action": right in every head.

    logits: head -> [B, N_h].  labels: head -> [B], -1 = unlabelled. An action counts over the clips labelled in all
    heads. A head that is itself called "action" keeps its own accuracy. NaN where no clip is labelled.
    k: of that many guesses, one has to be right; see `topk_hits`.  Source: KARMMA sec. 4; EPIC-KITCHENS-100.
    """
    hits, counted = topk_hits(logits, labels, k), labelled({head: labels[head] for head in logits})
    return {name: _share(hit, counted[name]) for name, hit in hits.items()}


def confidence(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return head -> [B] probability, 0..1, of the class that is predicted, and "action": the product over heads."""
    found = {head: scores.softmax(1).amax(1) for head, scores in logits.items()}
    return {ACTION: torch.stack(list(found.values())).prod(0), **found}


def calibration_error(sure: Tensor, hit: Tensor, n_bins: int = 15) -> float:
    """Return the expected calibration error, 0..1: how far probabilities are from the share that is right.

    sure: [B] probability of the prediction, 0..1.  hit: [B] bool, whether it is right. Clips are put into bins of equal
    width; the differences of mean probability and share are averaged, weighted by clips. NaN without clips.
    Source: Guo et al., On calibration of modern neural networks, 2017.
    """
    if not len(sure):
        return math.nan
    bins = (sure.double() * n_bins).ceil().long().clamp(1, n_bins) - 1  # (0, 1/15], (1/15, 2/15], ...
    gaps = torch.zeros(n_bins, dtype=torch.float64).index_add(0, bins, sure.double() - hit.double())
    return (gaps.abs().sum() / len(sure)).item()


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
    # Exactly 0 and 1 where all or none are right: rounding must not put a bound on the wrong side of the share.
    return max(centre - half, 0.0) if correct else 0.0, min(centre + half, 1.0) if correct < n else 1.0


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
