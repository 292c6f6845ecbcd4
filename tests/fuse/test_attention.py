"""Attention whose dropout belongs to clips: against the formula with the mask written out, and alone or together."""

import pytest
import torch
from karmma.fuse import attention
from karmma.fuse.attention import DroppedAttention, attend
from karmma.fuse.block import FusionBlock, FusionShape
from karmma.fuse.embedding import Embedded
from karmma.fuse.seeds import clip_seeds, kept, layer_seeds, levels

SEEDS = clip_seeds(7, 3, ["a", "b", "c"])
MASK = torch.tensor([[True, True, True, False, True]] * 2 + [[True, False, False, False, True]])[:, None, None]


def wave(*shape, start=0):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(start, start + n, dtype=torch.float64) * 0.7).reshape(shape)


def inputs():
    """Queries, keys and values [3, 2, 5, 4] as a Linear gives them, side by side in memory."""
    packed = wave(3, 5, 3, 2, 4).requires_grad_()
    return packed, packed.permute(2, 0, 3, 1, 4)


def plain(q, k, v, mask, p, seeds):
    """The formula, one clip and one head after the other, with the mask of each clip written out."""
    out = torch.empty_like(v)
    for clip, seed in enumerate(seeds):
        keep = kept(levels([seed], (q.shape[1], q.shape[2], q.shape[2]), q.device)[0], p)
        for head in range(q.shape[1]):
            scores = q[clip, head] @ k[clip, head].T / q.shape[-1] ** 0.5
            if mask is not None:
                scores = torch.where(mask[clip, 0], scores, -torch.inf)
            weights = scores.softmax(1) * keep[head] / (1 - p)
            out[clip, head] = weights @ v[clip, head]
    return out


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("p", [0.3, 0.9])
@pytest.mark.parametrize("chunk_bytes", [1, 800, 10**9], ids=["a head", "two clips", "all"])
def test_dropped_attention_values_and_gradients_match_the_plain_formula(monkeypatch, mask, p, chunk_bytes):
    monkeypatch.setattr(attention, "CHUNK_BYTES", chunk_bytes)
    results = []
    for way in (DroppedAttention.apply, plain):
        packed, (q, k, v) = inputs()
        out = way(q, k, v, mask, p, SEEDS)
        results.append((out, torch.autograd.grad((out * wave(*out.shape, start=9)).sum(), packed)[0]))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_dropped_attention_passes_the_check_by_finite_differences():
    q, k, v = (wave(2, 2, 3, 4, start=at).requires_grad_() for at in range(3))
    assert torch.autograd.gradcheck(lambda *given: DroppedAttention.apply(*given, None, 0.4, SEEDS[:2]), (q, k, v))


def test_a_clip_is_dropped_alike_whoever_is_beside_it():
    q, k, v = inputs()[1]
    together = attend(q, k, v, None, 0.5, SEEDS)
    for clip, seed in enumerate(SEEDS):
        one = slice(clip, clip + 1)
        torch.testing.assert_close(attend(q[one], k[one], v[one], None, 0.5, [seed]), together[one])


def test_the_share_that_is_dropped_is_p_in_every_quarter_of_a_draw():
    for p in (0.1, 0.3, 0.5):
        keep = kept(levels([5], (4, 300, 300), torch.device("cpu"))[0], p)
        assert set(keep.unique().tolist()) == {0.0, 1.0}
        shares = 1 - keep.flatten().view(-1, 4).double().mean(0)  # four of them come out of one draw of 64 bits
        assert (shares - p).abs().max() < 0.01  # six deviations of 90,000 draws
        assert 0.2 < (keep[0] == keep[1]).double().mean() < 0.95


def test_masks_depend_on_seed_step_clip_and_layer():
    seeds = {clip_seeds(seed, step, [clip])[0] for seed in (0, 1) for step in (0, 1) for clip in ("a", "b")}
    layers = {seed for layer in range(3) for seed in layer_seeds(sorted(seeds), layer)}
    assert len(seeds) == 8
    assert len(layers) == 24
    assert all(0 <= seed < 2**63 for seed in layers)
    assert clip_seeds(0, 12, ["P01_01_0"]) == [1284306156031619749]  # the same on every machine and version


def test_half_precision_stays_near_float32():
    q, k, v = (each.detach().float() for each in inputs()[1])
    exact = attend(q, k, v, MASK, 0.3, SEEDS)
    rough = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), MASK, 0.3, SEEDS)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.03


def test_without_seeds_the_masks_come_from_torchs_generator():
    q, k, v = inputs()[1]
    first, second = attend(q, k, v, None, 0.5, None), attend(q, k, v, None, 0.5, None)
    assert not first.equal(second)
    torch.manual_seed(1)
    third = attend(q, k, v, None, 0.5, None)
    torch.manual_seed(1)
    assert third.equal(attend(q, k, v, None, 0.5, None))


def test_layers_of_a_block_drop_different_places_and_the_same_again_under_the_same_seeds():
    shape = FusionShape(embed_dim=8, ffn_dim=8, n_layers=2, n_attention_heads=2, attention_dropout=0.5)
    torch.manual_seed(0)
    block = FusionBlock(shape)
    embedded = Embedded(wave(3, 5, 8).float(), {"video": 5}, None)
    first, again, other = (block(embedded, seeds)[0] for seeds in (SEEDS, SEEDS, layer_seeds(SEEDS, 1)))
    assert first.equal(again)
    assert not first.equal(other)
