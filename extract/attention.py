"""Attention with a learned bias for each pair of places, in a backward pass that keeps no scores."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Scores of so many bytes are dealt with at a time: they stay near the cores, and none are kept until the backward pass.
CHUNK_BYTES = 12 * 2**20


class BiasedAttention(Function):
    """softmax(q k' / sqrt(d) + bias) v for q, k, v [windows, heads, n, d] and one bias [heads, n, n].

    No fused kernel of the CPU has a gradient for the bias, and without one all scores [windows, heads, n, n] would be
    written, kept and read again.  Here the forward pass is fused, and the backward pass computes them a second time.
    There is no second derivative, and no forward-mode one.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Return [windows, heads, n, d]; the bias has the dtype of the others."""
        out = F.scaled_dot_product_attention(q, k, v, bias.detach()[None])
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of q, k, v and bias."""
        q, k, v, bias, out = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = (torch.empty_like(each) for each in (q, k, v))
        dbias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
        at_once = max(1, CHUNK_BYTES // (bias.numel() * bias.element_size()))
        for start in range(0, len(q), at_once):
            some = slice(start, start + at_once)
            scaled, g = q[some] * scale, grad[some]
            weights = (scaled @ k[some].transpose(-2, -1)).add_(bias).softmax(-1)
            dv[some] = weights.transpose(-2, -1) @ g
            mean = (g * out[some]).sum(-1, keepdim=True)  # of a row's gradient under its weights
            dscores = (g @ v[some].transpose(-2, -1)).sub_(mean).mul_(weights)
            dbias += dscores.sum(0)
            dq[some] = (dscores @ k[some]).mul_(scale)
            dk[some] = dscores.transpose(-2, -1) @ scaled
        return dq, dk, dv, dbias.to(bias.dtype)
