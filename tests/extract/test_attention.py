"""Attention with a learned bias: the fused forward and chunked backward pass against the plain formula."""

import pytest
import torch
from karmma.extract import attention
from karmma.extract.attention import BiasedAttention


def wave(*shape, start=0):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(start, start + n, dtype=torch.float64) * 0.7).reshape(shape)


def plain(q, k, v, bias):
    """The formula, one window and one head after the other."""
    out = torch.empty_like(q)
    for window in range(len(q)):
        for head in range(q.shape[1]):
            scores = q[window, head] @ k[window, head].T / q.shape[-1] ** 0.5 + bias[head]
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            out[window, head] = weights @ v[window, head]
    return out


# One window at a time, two (the last chunk being shorter), all at once.
@pytest.mark.parametrize("chunk_bytes", [1, 2 * 2 * 5 * 5 * 8, 10**9])
def test_biased_attention_values_and_gradients_match_the_plain_formula(monkeypatch, chunk_bytes):
    monkeypatch.setattr(attention, "CHUNK_BYTES", chunk_bytes)
    packed = wave(5, 5, 3, 2, 4).requires_grad_()  # [windows, n, qkv, heads, d], as a Linear gives it
    bias = wave(2, 5, 5, start=3).requires_grad_()
    results = []
    for attend in (BiasedAttention.apply, plain):
        out = attend(*packed.permute(2, 0, 3, 1, 4), bias)
        results.append((out, *torch.autograd.grad((out * wave(*out.shape, start=9)).sum(), (packed, bias))))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_biased_attention_passes_the_check_by_finite_differences():
    inputs = [wave(2, 2, 3, 4, start=at).requires_grad_() for at in range(3)]
    assert torch.autograd.gradcheck(BiasedAttention.apply, (*inputs, wave(2, 3, 3).requires_grad_()))


def test_biased_attention_of_half_precision_sums_the_gradient_of_the_bias_in_float32():
    q, k, v = (wave(64, 1, 3, 4, start=at).bfloat16() for at in range(3))
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        bias = wave(1, 3, 3).bfloat16().to(dtype).requires_grad_()
        BiasedAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), bias).sum().backward()
        assert bias.grad.dtype == dtype
        gradients.append(bias.grad.float())
    assert (gradients[0] - gradients[1]).abs().max() < 0.02 * gradients[1].abs().max() + 0.01


def test_biased_attention_keeps_no_scores_for_the_backward_pass():
    q, k, v = (wave(3, 2, 50, 4, start=at).requires_grad_() for at in range(3))
    bias = wave(2, 50, 50).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        BiasedAttention.apply(q, k, v, bias)
    assert (3, 2, 50, 50) not in kept
    assert bias.shape in kept
