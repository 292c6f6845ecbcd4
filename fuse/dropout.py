"""Modality dropout: which modalities of a clip a model may see in this step."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ..data.errors import ConfigError
from .seeds import MODALITIES, layer_seeds


def modality_dropout(present: Tensor, p: float, generator: Generator) -> Tensor:
    """Drop each available modality with probability `p`, per clip; where all would go, keep one of them, chosen evenly.

    present: [B, M] bool, True = available. Returns a new [B, M] bool on the same device. The draws come from
    `generator` (on the CPU) alone and are two per place whatever `present` holds, so the same generator state gives
    the same draws again.
    Raises ConfigError if p is not in 0..1, ValueError if a clip has no modality at all.
    Source: KARMMA sec. 3.4. With p = 0.5 and three modalities: 1/6 for each single one, 1/8 for each larger set.
    """
    return _kept(present, p, torch.rand(2, *present.shape, generator=generator))


def seeded_dropout(present: Tensor, p: float, seeds: Sequence[int]) -> Tensor:
    """Do as `modality_dropout` with one seed a clip: what a clip loses depends on nobody beside it."""
    own = layer_seeds(seeds, MODALITIES)  # not the first numbers of what else the clip's seed decides
    draws = [torch.rand(2, present.shape[1], generator=Generator().manual_seed(seed)) for seed in own]
    return _kept(present, p, torch.stack(draws, dim=1) if draws else torch.empty(2, *present.shape))


def _kept(present: Tensor, p: float, draws: Tensor) -> Tensor:
    """Return what stays; draws: [2, B, M], 0..1, whether to drop and whom to keep if all would go."""
    if not 0.0 <= p <= 1.0:
        raise ConfigError(f"Modality dropout: p is {p}, expected 0 to 1. Set it to the paper's 0.5.")
    if not present.any(1).all():
        rows = (~present.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"Modality dropout: rows {rows} have no modality to keep. Leave these clips out of the batch.")
    drop, order = draws.to(present.device)  # each [B, M]
    kept = present & (drop >= p)
    survivor = order.masked_fill(~present, -1.0).argmax(1, keepdim=True)  # [B, 1]
    one = torch.zeros_like(present).scatter(1, survivor, True)
    return torch.where(kept.any(1, keepdim=True), kept, one)
