"""Random numbers that belong to clips: what is dropped of one depends on (seed, step, clip) and on nobody beside it."""

import hashlib
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

LEVELS = 2**16  # a probability is kept to 16 bits: four masks out of one draw
MODALITIES, BACKBONES = -1, 1000  # layers that no fusion block has: modality dropout, and what backbones drop


def clip_seeds(seed: int, step: int, clip_ids: Sequence[str]) -> list[int]:
    """Return one seed a clip, 0..2^63 - 1, from the run's seed, the optimizer step and the clip's name alone."""
    texts = (f"{seed} {step} {clip_id}".encode() for clip_id in clip_ids)
    return [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1 for text in texts]


def layer_seeds(seeds: Sequence[int], layer: int) -> list[int]:
    """Return the seeds of one layer: no two layers drop the same places."""
    return [(seed + layer * 0x9E3779B97F4A7C15) % 2**63 for seed in seeds]


def levels(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return what decides whom dropout takes, int16 [seeds, *shape], every value equally likely; a seed decides its."""
    n = prod(shape)
    draws = torch.empty(len(seeds), -(-n // 4), dtype=torch.int64, device=device)
    for own, seed in zip(draws, seeds, strict=True):
        own.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    return draws.view(torch.int16)[:, :n].view(-1, *shape)


def kept(drawn: Tensor, p: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return 1 where a weight stays and 0 where it is dropped, with probability p, from its levels."""
    # Straight into numbers: multiplying by truth values takes ten times as long.
    numbers = torch.empty(drawn.shape, dtype=dtype, device=drawn.device)
    return torch.ge(drawn, min(round(p * LEVELS), LEVELS - 1) - LEVELS // 2, out=numbers)
