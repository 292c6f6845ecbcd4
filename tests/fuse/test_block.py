import pytest
import torch
from karmma.data.errors import ConfigError
from karmma.fuse.block import FusionBlock, FusionLayer, FusionShape
from karmma.fuse.embedding import Embedded
from karmma.fuse.heads import MultiHeadMLP
from torch import nn
from torch.nn import functional as F


def _wave(*shape, start=0):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(start, start + n, dtype=torch.float32) * 0.7).reshape(shape)


def _fill(module):
    """Give every parameter values from a formula."""
    with torch.no_grad():
        for at, parameter in enumerate(module.parameters()):
            parameter.copy_(0.4 * _wave(*parameter.shape, start=at))
    return module


def _reference(layer, shape):
    """torch's own encoder layer with the weights of ours."""
    reference = nn.TransformerEncoderLayer(
        shape.embed_dim, shape.n_attention_heads, shape.ffn_dim, 0.0, batch_first=True, norm_first=shape.norm_first
    )
    pairs = {
        reference.self_attn.in_proj_weight: layer.qkv.weight,
        reference.self_attn.in_proj_bias: layer.qkv.bias,
        reference.self_attn.out_proj.weight: layer.out.weight,
        reference.self_attn.out_proj.bias: layer.out.bias,
        reference.linear1.weight: layer.up.weight,
        reference.linear1.bias: layer.up.bias,
        reference.linear2.weight: layer.down.weight,
        reference.linear2.bias: layer.down.bias,
        reference.norm1.weight: layer.norm_attention.weight,
        reference.norm1.bias: layer.norm_attention.bias,
        reference.norm2.weight: layer.norm_ffn.weight,
        reference.norm2.bias: layer.norm_ffn.bias,
    }
    with torch.no_grad():
        for theirs, ours in pairs.items():
            theirs.copy_(ours)
    return reference, pairs


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_fusion_layer_values_and_gradients_match_torchs_encoder_layer(norm_first, masked):
    shape = FusionShape(embed_dim=8, ffn_dim=12, n_layers=1, n_attention_heads=2, norm_first=norm_first)
    layer = _fill(FusionLayer(shape))
    reference, pairs = _reference(layer, shape)
    keep = torch.tensor([[True, True, True, False, True], [True, True, False, False, False]]) if masked else None
    tokens = [_wave(2, 5, 8, start=3).requires_grad_() for _ in range(2)]
    ours = layer(tokens[0], None if keep is None else keep[:, None, None])
    theirs = reference(tokens[1], src_key_padding_mask=None if keep is None else ~keep)
    weight = _wave(2, 5, 8, start=9) * (1 if keep is None else keep[:, :, None])
    torch.testing.assert_close(ours * weight, theirs * weight)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(tokens[0].grad, tokens[1].grad)
    for reference_parameter, parameter in pairs.items():
        torch.testing.assert_close(parameter.grad, reference_parameter.grad)


def test_fusion_layer_attention_matches_loop_over_heads():
    shape = FusionShape(embed_dim=6, ffn_dim=4, n_layers=1, n_attention_heads=3)
    layer, tokens = _fill(FusionLayer(shape)), _wave(1, 4, 6)
    query, key, value = F.linear(tokens[0], layer.qkv.weight, layer.qkv.bias).chunk(3, dim=1)
    mixed = torch.zeros(4, 6)
    for head in range(3):
        places = slice(2 * head, 2 * head + 2)
        scores = query[:, places] @ key[:, places].T / 2**0.5
        mixed[:, places] = scores.softmax(1) @ value[:, places]
    after = layer.norm_attention(tokens[0] + layer.out(mixed))
    expected = layer.norm_ffn(after + layer.down(layer.up(after).clamp(min=0)))
    torch.testing.assert_close(layer(tokens, None)[0], expected)


def test_attention_dropout_acts_in_training_only():
    shape = FusionShape(embed_dim=8, ffn_dim=8, n_layers=1, n_attention_heads=2, attention_dropout=0.5)
    layer, tokens = _fill(FusionLayer(shape)), _wave(2, 5, 8)
    torch.manual_seed(0)
    assert not layer(tokens, None).equal(layer(tokens, None))
    layer.eval()
    assert layer(tokens, None).equal(layer(tokens, None))


def test_attention_dropout_of_everything_leaves_the_residual_path():
    """Only attention probabilities are dropped: with all of them gone the rest of the layer still works."""
    shape = FusionShape(embed_dim=8, ffn_dim=8, n_layers=1, n_attention_heads=2, attention_dropout=1.0)
    layer, tokens = _fill(FusionLayer(shape)), _wave(2, 5, 8)
    after = layer.norm_attention(tokens + layer.out.bias)
    expected = layer.norm_ffn(after + layer.down(layer.up(after).relu()))
    torch.testing.assert_close(layer(tokens, None), expected)


def _plain_block():
    """A block without layers, whose output is its input."""
    block = FusionBlock(FusionShape(embed_dim=2, ffn_dim=2, n_layers=0, n_attention_heads=1))
    with torch.no_grad():
        block.cls.copy_(torch.tensor([7.0, 8.0]))
    return block


TOKENS = torch.tensor([[[1.0, 2], [3, 4], [8, 0], [5, 5], [7, 7]]])


def test_fusion_block_averages_each_modality_by_hand():
    cls, averages = _plain_block()(Embedded(TOKENS, {"video": 3, "audio": 2}, None))
    assert cls.tolist() == [[7, 8]]
    assert averages["video"].tolist() == [[4, 2]]
    assert averages["audio"].tolist() == [[6, 6]]


def test_fusion_block_averages_only_tokens_that_are_kept():
    keep = torch.tensor([[True, True, False, False, False]])
    _, averages = _plain_block()(Embedded(TOKENS, {"video": 3, "audio": 2}, keep))
    assert averages["video"].tolist() == [[2, 3]]
    assert averages["audio"].tolist() == [[0, 0]]


def test_fusion_block_of_modality_without_tokens_gives_a_zero_row():
    _, averages = _plain_block()(Embedded(TOKENS, {"video": 5, "audio": 0}, None))
    assert averages["audio"].tolist() == [[0, 0]]


def test_fusion_block_masks_only_when_some_token_is_left_out(monkeypatch):
    seen = []
    attend = F.scaled_dot_product_attention

    def watch(*args, attn_mask):
        seen.append(attn_mask)
        return attend(*args, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    block = _fill(FusionBlock(FusionShape(embed_dim=2, ffn_dim=2, n_layers=2, n_attention_heads=1)))
    block(Embedded(TOKENS, {"video": 3, "audio": 2}, None))
    assert seen == [None, None]
    block(Embedded(TOKENS, {"video": 3, "audio": 2}, torch.tensor([[True, True, False, True, True]])))
    assert seen[2].flatten().tolist() == [True, True, True, False, True, True]  # CLS is always kept


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"n_attention_heads": 3}, "width 8 is not divisible by 3"),
        ({"attention_dropout": 1.5}, "is 1.5, expected 0 to 1"),
    ],
)
def test_fusion_shape_that_cannot_be_raises(numbers, message):
    with pytest.raises(ConfigError, match=message):
        FusionShape(**{"embed_dim": 8, "ffn_dim": 8, "n_layers": 1, "n_attention_heads": 2} | numbers)


def test_multi_head_mlp_averages_the_logits_of_the_counted_tokens():
    mlp, tokens = _fill(MultiHeadMLP(4, {"verb": 3, "noun": 5})), _wave(2, 3, 4)
    counted = torch.tensor([[True, True, True], [True, False, True]])
    logits = mlp(tokens, counted)
    for head, classes in (("verb", 3), ("noun", 5)):
        classify = mlp.classify[f"to_{head}"]
        expected = torch.zeros(2, classes)
        for clip in range(2):
            rows = [classify(mlp.shared(tokens[clip, at]).relu()) for at in range(3) if counted[clip, at]]
            expected[clip] = sum(rows) / len(rows)
        torch.testing.assert_close(logits[head], expected)
    torch.testing.assert_close(mlp(tokens[:1])["verb"], logits["verb"][:1])


def test_multi_head_mlp_takes_any_column_name_but_one_with_a_dot():
    assert set(MultiHeadMLP(2, {"type": 2, "keys": 2})(torch.zeros(1, 1, 2))) == {"type", "keys"}
    with pytest.raises(ConfigError, match=r"head 'a\.b' has a dot"):
        MultiHeadMLP(2, {"a.b": 2})
    with pytest.raises(ConfigError, match="no head given"):
        MultiHeadMLP(2, {})
