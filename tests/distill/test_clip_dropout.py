"""Dropout in trained backbones: by clip, in the share asked for, and blocks that are run again."""

import pytest
import torch
from karmma.data.modality import in_order
from karmma.distill.clip_dropout import ClipDropout, drop_by_clip, seed_clips
from karmma.distill.recompute import recompute_blocks
from karmma.extract.backbones import build_backbone
from karmma.fuse.seeds import clip_seeds
from torch import nn

SEEDS = clip_seeds(3, 1, ["a", "b", "c", "d"])
SHAPES = {"video": (4, 3, 32, 32), "audio": (4, 24, 32), "detections": (4, 3, 6)}
SMALL = {"video": "swin3d_micro", "audio": "timm:vit_tiny_patch16_224", "detections": "stlt_micro"}


def build(modality):
    """Return a small backbone that drops a lot, in training, and raw clips for it."""
    backbone = build_backbone(SMALL[modality], modality, SHAPES[modality], seed=1)
    for name, module in backbone.named_modules():
        # timm's fused attention draws by itself; none of its models drops there.
        if not name.endswith("attn_drop") and type(module).__name__ in ("Dropout", "StochasticDepth"):
            module.p = 0.4
    drop_by_clip(backbone)
    draw = torch.Generator().manual_seed(0)
    clips = torch.rand(4, *SHAPES[modality], generator=draw)
    if modality == "detections":
        clips[..., 5] = 1.0  # hands
    else:
        clips *= 255
    return backbone.train(), clips


def run(backbone, clips, seeds):
    """Return tokens, and the gradient of every parameter."""
    backbone.zero_grad()
    seed_clips(backbone, seeds)
    tokens = backbone(clips)
    weights = torch.arange(tokens[0].numel()).sin().view_as(tokens[0])  # a sum of squares after a norm is a constant
    (tokens * weights).sum().backward()
    return tokens.detach(), {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("modality", in_order(SMALL))
def test_what_is_dropped_of_a_clip_does_not_depend_on_its_neighbours(modality):
    backbone, clips = build(modality)
    together, wanted = run(backbone, clips, SEEDS)
    parts = [run(backbone, clips[some], [SEEDS[at] for at in some]) for some in ([2], [3, 0], [1])]
    assert torch.allclose(torch.cat([tokens for tokens, _ in parts]), together[[2, 3, 0, 1]], atol=1e-5)
    assert wanted.keys() == parts[0][1].keys()
    for name, gradient in wanted.items():
        total = sum(gradients[name] for _, gradients in parts)
        assert torch.allclose(total, gradient, atol=1e-5 * max(1.0, gradient.abs().max().item())), name
    other, _ = run(backbone, clips, clip_seeds(3, 2, ["a", "b", "c", "d"]))
    assert any(isinstance(module, ClipDropout) for module in backbone.modules())
    assert not torch.allclose(other, together, atol=1e-3)


def test_values_are_dropped_in_their_share_and_the_rest_grows_as_torch_does_it():
    layer = ClipDropout(0.3, layer=5, whole=False)
    seed_clips(layer, SEEDS)
    out = layer(torch.ones(8, 50, 40))
    assert sorted(set(out.flatten().tolist())) == [0.0, pytest.approx(1 / 0.7)]
    assert (out == 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(layer.eval()(torch.ones(3, 2)), torch.ones(3, 2))


def test_branches_are_dropped_as_a_whole_and_by_row():
    layer = ClipDropout(0.5, layer=5, whole=True)
    seed_clips(layer, clip_seeds(0, 0, [str(clip) for clip in range(64)]))
    rows = layer(torch.ones(64, 3, 4)).flatten(1)
    assert all(len(set(row.tolist())) == 1 for row in rows)
    assert 20 < (rows[:, 0] == 0).sum() < 44


def test_all_is_dropped_at_one_and_places_of_a_model_differ():
    assert ClipDropout(1.0, layer=0, whole=False)(torch.ones(2, 3)).eq(0).all()
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).train()
    drop_by_clip(model)
    seed_clips(model, SEEDS)
    first, second = (place(torch.ones(4, 64)) for place in model)
    assert not torch.equal(first, second)


def test_a_layout_of_its_own_draws_from_the_generator_of_torch():
    layer = ClipDropout(0.5, layer=0, whole=False)
    seed_clips(layer, SEEDS)
    torch.manual_seed(1)
    first = layer(torch.ones(7, 30))
    torch.manual_seed(1)
    assert torch.equal(layer(torch.ones(7, 30)), first)


@pytest.mark.parametrize("modality", in_order(SMALL))
def test_blocks_run_again_give_the_same_gradients_and_keep_less(modality):
    backbone, clips = build(modality)
    kept = []

    def pack(tensor):
        kept[-1] += tensor.numel()
        return tensor

    found = []
    for _ in range(2):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found.append(run(backbone, clips, SEEDS))
        recompute_blocks(backbone)  # before the second pass
    (tokens, gradients), (again, gradients_again) = found
    assert torch.equal(tokens, again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, gradients_again[name], rtol=1e-5, atol=1e-6), name
    assert kept[1] < 0.5 * kept[0]
