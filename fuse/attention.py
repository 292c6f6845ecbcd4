"""Attention with dropout whose masks belong to clips: the same on one rank or several, and never kept in memory."""

import hashlib
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK_BYTES = 8 * 2**20  # of scores that are dealt with at a time
LEVELS = 2**16  # a probability is kept to 16 bits: four masks out of one draw


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
    return torch.ge(drawn, round(p * LEVELS) - LEVELS // 2, out=numbers)


class DroppedAttention(Function):
    """Attention over q, k, v [B, heads, N, d], its weights dropped with probability p, under one seed a clip.

    A few heads of a clip, or a few small clips, at a time: scores, weights and mask stay near the cores, and the
    backward pass makes them a second time. torch would write, keep and read all of them, [B, heads, N, N].
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, seeds: Sequence[int]
    ) -> Tensor:
        """Return [B, heads, N, d].  mask: [B, 1, 1, N] bool, True = may be attended to; None = all.  p: below 1."""
        out = torch.empty_like(q)
        for at, weights, keep in _pieces(q, k, mask, p, seeds):
            out[at] = (weights.mul_(keep) @ v[at]).div_(1 - p)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.p, ctx.seeds = p, tuple(seeds)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        q, k, v, mask, out = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = (torch.empty_like(each) for each in (q, k, v))
        mean = (grad * out).sum(-1, keepdim=True)  # of a row's gradient under its weights
        grad = grad / (1 - ctx.p)
        for at, weights, keep in _pieces(q, k, mask, ctx.p, ctx.seeds):
            dscores = (grad[at] @ v[at].transpose(-2, -1)).mul_(keep).sub_(mean[at]).mul_(weights)
            dv[at] = weights.mul_(keep).transpose(-2, -1) @ grad[at]
            dq[at] = (dscores @ k[at]).mul_(scale)
            dk[at] = (dscores.transpose(-2, -1) @ q[at]).mul_(scale)
        return dq, dk, dv, None, None, None


def _pieces(
    q: Tensor, k: Tensor, mask: Tensor | None, p: float, seeds: Sequence[int]
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
    """Yield (clips, heads), their weights [b, n, N, N] before dropout, and 1 where one of these stays, else 0."""
    n_clips, n_heads, n_tokens, width = q.shape
    at_once = max(1, CHUNK_BYTES // (n_tokens**2 * q.element_size()))
    n_together = max(1, at_once // n_heads)  # several small clips, or a few heads of one
    for first in range(0, n_clips, n_together):
        clips = slice(first, first + n_together)
        drawn = levels(seeds[clips], (n_heads, n_tokens, n_tokens), q.device)
        for head in range(0, n_heads, at_once):
            at = clips, slice(head, head + at_once)
            scores = (q[at] * width**-0.5) @ k[at].transpose(-2, -1)
            if mask is not None:
                scores.masked_fill_(~mask[clips], -torch.inf)
            yield at, scores.softmax(-1), kept(drawn[:, at[1]], p, scores.dtype)


@torch.compiler.disable  # it would compile anew for every seed
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, seeds: Sequence[int] | None) -> Tensor:
    """Return softmax(q k' / sqrt(d)) v, [B, heads, N, d], with dropout of the weights.

    mask: [B, 1, 1, N] bool, True = may be attended to; None = all.  p: probability of dropping a weight, above 0 and
    at most 1.  seeds: one a clip; None draws them from torch's own generator.
    """
    if p == 1.0:
        return torch.zeros_like(v)
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (len(q),)).tolist()
    if q.device.type != "cuda":
        return DroppedAttention.apply(q, k, v, mask, p, seeds)
    out = []  # a GPU's fused kernel draws its own mask, from the generator's seed
    with torch.random.fork_rng([q.device]):
        for clip, seed in enumerate(seeds):
            torch.cuda.default_generators[q.device.index].manual_seed(seed)
            one = slice(clip, clip + 1)
            out.append(F.scaled_dot_product_attention(q[one], k[one], v[one], None if mask is None else mask[one], p))
    return torch.cat(out)
