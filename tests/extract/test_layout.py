import pytest
import torch
from karmma.extract.layout import EncoderLayer, LayoutTransformer
from torch import nn

NAMES = {
    "qkv.": "self_attn.in_proj_",
    "proj.": "self_attn.out_proj.",
    "ffn.0.": "linear1.",
    "ffn.3.": "linear2.",
    "norm_attention.": "norm1.",
    "norm_ffn.": "norm2.",
}


def formula(*shape):
    return torch.sin(torch.arange(torch.Size(shape).numel()) * 0.7).view(shape)


def micro(shape=(3, 4, 6), dropout=0.0):
    torch.manual_seed(0)
    return LayoutTransformer(shape, width=16, n_heads=2, n_spatial=1, n_temporal=2, dropout=dropout)


def detections(batch=2):
    """Three frames of up to four boxes; the second frame of the first clip has none."""
    x = formula(batch, 3, 4, 6).abs()
    x[..., 5] = torch.tensor([1, 2, 2, 0])
    x[0, 1, :, 5] = 0
    return x


def test_encoder_layer_equals_torchs_post_norm_layer_values_and_gradients():
    torch.manual_seed(0)
    ours = EncoderLayer(8, 2, dropout=0.0)
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True)
    renamed = {}
    for name, tensor in ours.state_dict().items():
        old = next(prefix for prefix in NAMES if name.startswith(prefix))
        renamed[name.replace(old, NAMES[old])] = tensor
    theirs.load_state_dict(renamed)
    x = formula(2, 5, 8).requires_grad_()
    seen = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    outs = ours(x, seen[:, None, None]), theirs(x, src_key_padding_mask=~seen)
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((out * formula(2, 5, 8)).sum(), x)[0] for out in outs]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_stlt_gives_one_token_a_frame_and_the_clips_last():
    backbone = micro().eval()
    assert backbone.n_tokens == 4
    assert backbone(detections()).shape == (2, 4, 16)


def test_stlt_does_not_look_at_rows_without_a_box_not_even_at_nan():
    backbone, clean = micro(), detections()
    dirty = clean.clone()
    dirty[..., :5][clean[..., 5] == 0] = torch.nan
    results = []
    for x in (clean, dirty):
        tokens = backbone(x)
        results.append((tokens, *torch.autograd.grad((tokens * formula(2, 4, 16)).sum(), list(backbone.parameters()))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


def test_stlt_without_any_box_is_finite_and_so_are_its_gradients():
    backbone = micro()
    tokens = backbone(torch.zeros(2, 3, 4, 6))
    (tokens * formula(2, 4, 16)).sum().backward()
    assert tokens.isfinite().all()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_stlt_tells_a_frame_without_boxes_from_one_with_boxes():
    backbone, x = micro().eval(), detections()
    filled = x.clone()
    filled[0, 1, 0, 5] = 1
    assert not torch.allclose(backbone(filled)[0, 1], backbone(x)[0, 1], atol=1e-3)


def test_stlt_does_not_depend_on_the_order_of_boxes():
    backbone, x = micro().eval(), detections()
    torch.testing.assert_close(backbone(x[:, :, [2, 3, 0, 1]]), backbone(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("field", range(6), ids=["x1", "y1", "x2", "y2", "score", "category"])
def test_stlt_uses_every_field_of_a_box(field):
    backbone, x = micro().eval(), detections()
    other = x.clone()
    other[0, 0, 0, field] = 2.0
    assert not torch.allclose(backbone(other)[0], backbone(x)[0], atol=1e-4)


def test_stlt_frames_look_back_only_and_the_clip_sees_all():
    backbone, x = micro().eval(), detections()
    other = x.clone()
    other[:, 2, 0, :4] += 0.5
    before, after = backbone(x), backbone(other)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2], before[:, 2], atol=1e-3)
    assert not torch.allclose(after[:, 3], before[:, 3], atol=1e-3)


def test_stlt_knows_the_order_of_frames():
    backbone, x = micro().eval(), detections()
    assert not torch.allclose(backbone(x.flip(1))[:, 3], backbone(x)[:, 3], atol=1e-4)


def test_stlt_drops_out_in_training_only():
    backbone, x = micro(dropout=0.5), detections()
    assert not torch.equal(backbone(x), backbone(x))
    backbone.eval()
    assert torch.equal(backbone(x), backbone(x))
