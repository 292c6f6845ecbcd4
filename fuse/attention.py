"""Attention with dropout whose masks belong to clips: the same on one rank or several, and never kept in memory."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEVELS = 2**16  # a probability is kept to 16 bits: four masks out of one draw


def clip_seeds(seed: int, step: int, clip_ids: Sequence[str]) -> list[int]:
    """Return one seed a clip, 0..2^63 - 1, from the run's seed, the optimizer step and the clip's name alone."""
    texts = (f"{seed} {step} {clip_id}".encode() for clip_id in clip_ids)
    return [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1 for text in texts]


def layer_seeds(seeds: Sequence[int], layer: int) -> list[int]:
    """Return the seeds of one layer: no two layers drop the same places."""
    return [(seed + layer * 0x9E3779B97F4A7C15) % 2**63 for seed in seeds]


def kept(seed: int, p: float, scores: Tensor) -> Tensor:
    """Return which of the scores stay, bool of their shape: each is dropped with probability p."""
    generator = torch.Generator(scores.device).manual_seed(seed)
    draws = torch.empty(-(-scores.numel() // 4), dtype=torch.int64, device=scores.device)
    draws.random_(-(2**63), None, generator=generator)
    levels = draws.view(torch.int16)[: scores.numel()].view(scores.shape)  # -2^15 .. 2^15 - 1
    return levels >= round(p * LEVELS) - LEVELS // 2


class DroppedAttention(Function):
    """Attention over q, k, v [B, heads, N, d], its weights dropped with probability p, under one seed a clip.

    A clip at a time: scores, weights and mask stay near the cores, and the backward pass makes them a second time.
    torch would write, keep and read all of them, [B, heads, N, N].
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, seeds: Sequence[int]
    ) -> Tensor:
        """Return [B, heads, N, d].  mask: [B, 1, 1, N] bool, True = may be attended to; None = all.  p: below 1."""
        out = torch.empty_like(q)
        for clip, seed in enumerate(seeds):
            weights, keep = _dropped(q[clip], k[clip], mask, p, clip, seed)
            out[clip] = (weights.mul_(keep) @ v[clip]).div_(1 - p)
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
        for clip, seed in enumerate(ctx.seeds):
            weights, keep = _dropped(q[clip], k[clip], mask, ctx.p, clip, seed)
            g = grad[clip] / (1 - ctx.p)
            mean = (grad[clip] * out[clip]).sum(-1, keepdim=True)  # of a row's gradient under its weights
            dscores = (g @ v[clip].transpose(-2, -1)).mul_(keep).sub_(mean).mul_(weights)
            dv[clip] = weights.mul_(keep).transpose(-2, -1) @ g
            dq[clip] = (dscores @ k[clip]).mul_(scale)
            dk[clip] = (dscores.transpose(-2, -1) @ q[clip]).mul_(scale)
        return dq, dk, dv, None, None, None


def _dropped(q: Tensor, k: Tensor, mask: Tensor | None, p: float, clip: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return one clip's weights [heads, N, N] before dropout, and which of them stay."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores.masked_fill_(~mask[clip], -torch.inf)
    return scores.softmax(-1), kept(seed, p, scores)


@torch.compiler.disable  # it would compile anew for every seed
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, seeds: Sequence[int] | None) -> Tensor:
    """Return softmax(q k' / sqrt(d)) v, [B, heads, N, d], with dropout of the weights.

    mask: [B, 1, 1, N] bool, True = may be attended to; None = all.  p: probability of dropping a weight, above 0, at most 1.
    seeds: one a clip; None draws them from torch's own generator.
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
            torch.cuda.manual_seed(seed)
            one = slice(clip, clip + 1)
            out.append(F.scaled_dot_product_attention(q[one], k[one], v[one], None if mask is None else mask[one], p))
    return torch.cat(out)
