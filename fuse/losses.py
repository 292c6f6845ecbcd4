"""The teacher's losses: cross-entropy over all heads, and InfoNCE that draws every modality towards video."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.errors import ConfigError
from .ranks import n_ranks, over_ranks, summed

ANCHOR = "video"
UNLABELLED = -1


def count_labels(labels: Mapping[str, Tensor]) -> Tensor:
    """Return how many clips of the batch, over all ranks, are labelled in each head, [heads]; labels: head -> [B]."""
    return summed(torch.stack([(values != UNLABELLED).sum() for values in labels.values()]))


def cross_entropy(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], n_labelled: Tensor | None = None
) -> Tensor:
    """Return the mean over heads of the mean cross-entropy over labelled clips, a scalar in float32 or better.

    logits: head -> [B, N_h].  labels: head -> [B] int64, -1 = unlabelled. A head without a labelled clip is left out of
    both the sum and the number of heads; if that is all of them the loss is 0, and its gradients are too. Where several
    ranks train, labels are counted over all of them, so that the mean of their losses is that of the whole batch.
    n_labelled: [heads], what `count_labels` says of a whole batch; these clips are then a part of it, and the losses of
    all parts add up to the whole one's.
    Raises ValueError if a head has no labels.  Source: KARMMA eq. 1, which leaves open how heads are weighted.
    """
    for head in logits:
        if head not in labels:
            raise ValueError(f"Cross-entropy: no labels of head {head!r}; found {', '.join(labels) or 'none'}.")
    if n_labelled is None:
        n_labelled = count_labels({head: labels[head] for head in logits})
    total = 0.0
    for (head, scores), n in zip(logits.items(), n_labelled, strict=True):
        loss = F.cross_entropy(_precise(scores), labels[head], ignore_index=UNLABELLED, reduction="sum")
        total = total + loss / n.clamp(min=1)
    return total * n_ranks() / (n_labelled > 0).sum().clamp(min=1)


def info_nce(
    tokens: Mapping[str, Tensor], tau: float, present: Tensor | None = None, symmetric: bool = False
) -> Tensor:
    """Return the alignment loss of all modalities to video, a scalar in float32 or better.

    tokens: modality -> [B, E], averaged after the fusion block.  tau: temperature, above 0.  present: [B, M] bool,
    columns in the order of `tokens`; None = all there. Per modality, the clips that have both it and video are told
    apart: video rows are anchors, their own clip is the positive, the others are the negatives; similarity is
    cosine / tau, the loss is averaged over these clips. With `symmetric`, the mean of both directions.
    The sum over modalities is divided by M - 1, whoever is there; fewer than two clips give 0, as do tokens without
    video or of one modality. Where several ranks train, the batch is that of all of them; see `over_ranks`.
    Raises ConfigError if tau <= 0, ValueError if present does not fit.
    Source: KARMMA eq. 2.
    """
    if not tau > 0:
        raise ConfigError(f"InfoNCE: tau is {tau}, expected a number above 0. Set it to the paper's 0.1.")
    names = list(tokens)
    first = tokens[names[0]]
    if present is None:
        present = torch.ones(len(first), len(names), dtype=torch.bool, device=first.device)
    if present.shape != (len(first), len(names)) or present.dtype != torch.bool:
        raise ValueError(f"InfoNCE: present is {tuple(present.shape)}, expected bool [{len(first)}, {len(names)}].")
    total = _precise(first[:0]).sum()  # 0 that belongs to the graph
    if ANCHOR not in tokens or len(names) == 1:
        return total
    # Every rank sends all its modalities, whoever is there: none waits for one that has nothing to send.
    tokens, present = {name: over_ranks(values) for name, values in tokens.items()}, over_ranks(present)
    has_anchor = present[:, names.index(ANCHOR)]
    for column, name in enumerate(names):
        pairs = has_anchor & present[:, column]  # [B]
        if name != ANCHOR and pairs.sum() >= 2:
            total = total + _contrast(tokens[ANCHOR][pairs], tokens[name][pairs], tau, symmetric)
    return total / (len(names) - 1)


def _contrast(anchors: Tensor, others: Tensor, tau: float, symmetric: bool) -> Tensor:
    """Return the mean cross-entropy of finding each anchor's own clip; anchors, others: [n, E], row i the same clip."""
    with torch.autocast(anchors.device.type, enabled=False):  # it would multiply in half precision
        similarity = F.normalize(_precise(anchors), dim=1) @ F.normalize(_precise(others), dim=1).T / tau  # [n, n]
    own = torch.arange(len(anchors), device=anchors.device)
    loss = F.cross_entropy(similarity, own)
    return (loss + F.cross_entropy(similarity.T, own)) / 2 if symmetric else loss


def _precise(values: Tensor) -> Tensor:
    """Return the values in float32 at least: exponentials of half precision lose too much."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
