"""Attention with dropout whose masks belong to clips: the same on one rank or several, and never kept in memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .seeds import kept, levels

CHUNK_BYTES = 8 * 2**20  # of scores that are dealt with at a time


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
