from types import SimpleNamespace

import pytest
import torch
from karmma.fuse.embedding import STRATEGIES
from karmma.fuse.model import FusionModel, build_fusion
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

WIDTHS = {"video": 8, "flow": 8, "audio": 6}
COUNTS = {"video": 5, "flow": 5, "audio": 3}
HEADS = {"verb": 4, "noun": 3}
TOY = {"embed_dim": 8, "ffn_dim": 8, "n_layers": 2, "n_attention_heads": 2}
EPIC = {"verb": 97, "noun": 300}
PRESENT = torch.tensor([[True, True, True], [True, False, True], [False, False, True], [False, True, False]])


def _wave(*shape, start=0):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(start, start + n, dtype=torch.float32) * 0.7).reshape(shape)


def _model(missing, **numbers):
    model = FusionModel(WIDTHS, COUNTS, HEADS, missing=missing, **TOY | numbers)
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.copy_(0.4 * _wave(*parameter.shape, start=at))
    return model


def _batch(n_clips=4):
    return {name: _wave(n_clips, COUNTS[name], width, start=len(name)) for name, width in WIDTHS.items()}


def _loss(output, present):
    """A scalar that depends on all that is promised: logits, CLS and the averaged tokens of what is there."""
    total = sum((logits * _wave(*logits.shape)).sum() for logits in output.logits.values()) + output.cls.square().sum()
    for column, averages in enumerate(output.tokens.values()):
        total = total + (averages[present[:, column]] ** 3).sum()
    return total


def _gradients(model, tokens, present):
    model.zero_grad()
    output = model(tokens, present)
    _loss(output, present).backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("missing", STRATEGIES)
def test_model_output_has_the_promised_names_and_shapes(missing):
    model = _model(missing)
    output = model(_batch(), PRESENT)
    assert model.modalities == ("video", "flow", "audio")
    assert tuple(model.n_classes) == ("verb", "noun")
    assert {head: tuple(logits.shape) for head, logits in output.logits.items()} == {"verb": (4, 4), "noun": (4, 3)}
    assert {name: tuple(tokens.shape) for name, tokens in output.tokens.items()} == dict.fromkeys(WIDTHS, (4, 8))
    assert output.cls.shape == (4, 8)


@pytest.mark.parametrize("missing", STRATEGIES)
@pytest.mark.parametrize("nothing", [float("nan"), float("inf"), 1e30])
def test_rows_of_missing_modality_never_reach_outputs_or_gradients(missing, nothing):
    clean, spoilt = _batch(), _batch()
    for column, name in enumerate(WIDTHS):
        clean[name] = torch.where(PRESENT[:, column, None, None], clean[name], 0.0)
        spoilt[name] = torch.where(PRESENT[:, column, None, None], spoilt[name], nothing).requires_grad_()
    model = _model(missing)
    expected, expected_gradients = _gradients(model, clean, PRESENT)
    found, found_gradients = _gradients(model, spoilt, PRESENT)
    for head in HEADS:
        assert found.logits[head].isfinite().all()
        assert found.logits[head].equal(expected.logits[head])
    for name in WIDTHS:
        assert found.tokens[name].isfinite().all()
        assert found.tokens[name].equal(expected.tokens[name])
    for name, gradient in found_gradients.items():
        assert gradient.isfinite().all(), name
        assert gradient.equal(expected_gradients[name]), name
    for column, name in enumerate(WIDTHS):
        gradient = spoilt[name].grad
        assert (gradient[~PRESENT[:, column]] == 0).all()
        assert gradient[PRESENT[:, column]].abs().amax(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("missing", STRATEGIES)
def test_mixed_batch_equals_loop_over_single_clips(missing):
    """Values and gradients: one masked batch against clips alone, whose missing modalities are not even given."""
    model, batch = _model(missing), _batch()
    together, gradients = _gradients(model, batch, PRESENT)
    model.zero_grad()
    weights = {head: _wave(*logits.shape) for head, logits in together.logits.items()}
    for row in range(4):
        present = PRESENT[row : row + 1]
        given = [name for column, name in enumerate(WIDTHS) if present[0, column]]
        alone = model({name: batch[name][row : row + 1] for name in given}, present)
        loss = sum((alone.logits[head] * weights[head][row]).sum() for head in HEADS) + alone.cls.square().sum()
        (loss + sum((alone.tokens[name] ** 3).sum() for name in given)).backward()
        for head in HEADS:
            torch.testing.assert_close(alone.logits[head][0], together.logits[head][row])
        for name in WIDTHS:
            torch.testing.assert_close(alone.tokens[name][0], together.tokens[name][row])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("missing", STRATEGIES)
def test_modality_missing_from_the_whole_batch_may_be_left_out(missing):
    model, present = _model(missing), torch.tensor([[True, False, True]] * 2)
    batch = _batch(2)
    given, gradients = _gradients(model, batch | {"flow": torch.full((2, 5, 8), torch.nan)}, present)
    left_out, gradients_left_out = _gradients(model, {name: batch[name] for name in ("video", "audio")}, present)
    for head in HEADS:
        assert given.logits[head].equal(left_out.logits[head])
    unused = ["embedding.project.flow"]
    if missing == "B.4":  # its tokens are for missing modalities only
        unused += ["embedding.token_tokens.video", "embedding.token_tokens.audio"]
    for name, gradient in gradients.items():
        if name.startswith(tuple(unused)):
            assert gradient is None, name
            assert gradients_left_out[name] is None, name
        else:
            assert gradient.equal(gradients_left_out[name]), name
            assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("missing", STRATEGIES)
def test_every_parameter_gets_a_gradient_from_a_mixed_batch(missing):
    for name, gradient in _gradients(_model(missing), _batch(), PRESENT)[1].items():
        assert gradient.abs().sum() > 0, name


def test_ignore_averages_the_predictions_of_present_modalities_and_cls():
    model = _model("ignore")
    output = model(_batch(), PRESENT)
    for row in range(4):
        fused = [output.cls[row], *(output.tokens[m][row] for c, m in enumerate(WIDTHS) if PRESENT[row, c])]
        hidden = [model.mlp.shared(token).relu() for token in fused]
        expected = sum(model.mlp.classify["to_verb"](each) for each in hidden) / len(hidden)
        torch.testing.assert_close(output.logits["verb"][row], expected)


@pytest.mark.parametrize("missing", STRATEGIES[1:])
def test_strategies_with_tokens_average_all_predictions(missing):
    model = _model(missing)
    output = model(_batch(), PRESENT)
    hidden = model.mlp.shared(torch.stack([output.cls, *output.tokens.values()])).relu()  # [M + 1, B, 2 E]
    torch.testing.assert_close(output.logits["noun"], model.mlp.classify["to_noun"](hidden).mean(0))


def test_cls_sees_every_modality():
    model, batch = _model("ignore"), _batch()
    everything = torch.ones(4, 3, dtype=torch.bool)
    for name in WIDTHS:
        changed = batch | {name: batch[name] + 1.0}
        assert not model(batch, everything).cls.allclose(model(changed, everything).cls, atol=1e-4)


def test_model_overfits_a_single_batch():
    torch.manual_seed(0)
    model = FusionModel(WIDTHS, COUNTS, HEADS, missing="B.5", **TOY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = torch.tensor([0, 1, 2, 3])
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(model(_batch(), PRESENT).logits["verb"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("missing", STRATEGIES)
def test_model_in_bfloat16_autocast_stays_near_float32(missing):
    model, batch = _model(missing), _batch()
    exact = model(batch, PRESENT).logits["verb"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch, PRESENT).logits["verb"]
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_present_without_tokens_raises():
    with pytest.raises(ValueError, match="present has clips with flow, but no tokens of flow"):
        _model("B.5")({name: _batch()[name] for name in ("video", "audio")}, PRESENT)


def test_build_fusion_takes_numbers_from_a_config_and_missing_from_the_caller():
    config = SimpleNamespace(**TOY, attention_dropout=0.25, norm_first=True, missing="B.5")
    model = build_fusion(WIDTHS, COUNTS, HEADS, config)
    assert model.embedding.missing == "B.5"
    assert model.block.layers[1].dropout == 0.25
    assert model.block.layers[1].norm_first
    assert build_fusion(WIDTHS, COUNTS, HEADS, config, missing="ignore").embedding.missing == "ignore"


# The paper's own numbers (Tab. 2, Fig. 5). Backbones are counted elsewhere: here they are given, or cancel out.
TEACHER = {"embed_dim": 768, "ffn_dim": 768, "n_layers": 2, "n_attention_heads": 8, "attention_dropout": 0.3}
STUDENT = {"embed_dim": 384, "ffn_dim": 384, "n_layers": 1, "n_attention_heads": 8}
SWIN_T, AST_T = 27_850_470, 6_960_960


def _n_parameters(widths, n_tokens, missing, numbers):
    with torch.device("meta"):
        model = FusionModel(widths, n_tokens, EPIC, missing=missing, **numbers)
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_are_the_published_ones():
    three = ("video", "flow", "audio")
    teacher = _n_parameters(dict.fromkeys(three, 1024), dict.fromkeys(three, 300), "ignore", TEACHER)
    assert f"{teacher / 1e6:.2f}" == "11.25"
    widths, n_tokens = {"video": 768, "flow": 768, "audio": 192}, {"video": 300, "flow": 300, "audio": 253}
    student = _n_parameters(widths, n_tokens, "B.5", STUDENT)
    assert f"{(2 * SWIN_T + AST_T + student) / 1e6:.2f}" == "65.15"
    alone = _n_parameters({"video": 768}, {"video": 300}, "ignore", STUDENT)
    assert f"{(SWIN_T + alone) / 1e6:.2f}" == "29.64"
    assert student - _n_parameters(widths, n_tokens, "ignore", STUDENT) == (300 + 300 + 253 + 3) * 384


def _gflops(numbers, widths, n_tokens):
    """Matrix products of fusing one clip, a multiply-add as two operations."""
    model = FusionModel(widths, n_tokens, EPIC, **numbers).eval()
    tokens = {name: torch.zeros(1, n_tokens[name], width) for name, width in widths.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, torch.ones(1, len(widths), dtype=torch.bool))
    return counter.get_total_flops() / 1e9


def test_teacher_gflops_of_one_two_and_three_modalities_are_the_published_ones():
    names, published = ("video", "flow", "audio"), (567.961388, 1137.010955, 1707.166449)
    fusing = [_gflops(TEACHER, dict.fromkeys(names[:n], 1024), dict.fromkeys(names[:n], 300)) for n in (1, 2, 3)]
    swin_b = published[0] - fusing[0]  # the one unknown
    for n in (2, 3):
        assert n * swin_b + fusing[n - 1] == pytest.approx(published[n - 1], abs=2e-5)


def test_student_gflops_of_five_subsets_are_the_published_ones():
    widths, n_tokens = {"video": 768, "flow": 768, "audio": 192}, {"video": 300, "flow": 300, "audio": 253}

    def fusing(*names):
        return _gflops(STUDENT, {name: widths[name] for name in names}, {name: n_tokens[name] for name in names})

    swin_t, ast_t = 176.378806 - fusing("video"), 4.672219 - fusing("audio")  # the two unknowns
    assert 2 * swin_t + fusing("video", "flow") == pytest.approx(353.031127, abs=2e-5)
    assert swin_t + ast_t + fusing("video", "audio") == pytest.approx(181.281226, abs=2e-5)
    assert 2 * swin_t + ast_t + fusing("video", "flow", "audio") == pytest.approx(358.166719, abs=2e-5)


@pytest.mark.parametrize("missing", STRATEGIES)
def test_clip_with_its_seed_gives_the_same_in_any_batch_dropout_included(missing):
    """Even where nobody else has a modality: the batch of one leaves out what the others would have brought."""
    model = _model(missing, attention_dropout=0.3).train()
    batch, seeds = _batch(), [11, 12, 13, 14]
    together = model(batch, PRESENT, seeds)
    assert not together.logits["verb"].allclose(model(batch, PRESENT, seeds[::-1]).logits["verb"])
    for row in range(4):
        one = slice(row, row + 1)
        given = {m: batch[m][one] for column, m in enumerate(WIDTHS) if PRESENT[row, column]}
        alone = model(given, PRESENT[one], seeds[one])
        for head in HEADS:
            torch.testing.assert_close(alone.logits[head], together.logits[head][one])
        for column, name in enumerate(WIDTHS):
            if PRESENT[row, column]:
                torch.testing.assert_close(alone.tokens[name], together.tokens[name][one])
