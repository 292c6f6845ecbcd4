import math
from itertools import pairwise

import pytest
import torch
from karmma.data.errors import ConfigError
from karmma.fuse.model import FusionModel
from karmma.fuse.schedule import learning_rate, parameter_groups
from torch import nn


def _rates(steps_per_epoch, **settings):
    n_steps = steps_per_epoch * settings.get("epochs", 100)
    return [learning_rate(step, steps_per_epoch, **settings) for step in range(n_steps)]


def test_learning_rate_of_the_paper_starts_peaks_and_ends_where_it_says():
    rates = _rates(50, max_lr=5e-4)
    assert rates[0] == 1e-5
    assert rates[250] == pytest.approx((1e-5 + 5e-4) / 2)  # epoch 5, half the warm-up
    assert rates[500] == 5e-4
    assert rates[-1] == 1e-5
    assert rates[500 + 4499 // 3] == pytest.approx(1e-5 + 4.9e-4 * (1 + math.cos(math.pi * 1499 / 4499)) / 2)
    assert learning_rate(5000, 50, max_lr=5e-4) == 1e-5


def test_learning_rate_by_hand():
    found = _rates(2, max_lr=1.0, min_lr=0.0, warmup_epochs=1, epochs=4)
    half = (1 + math.cos(math.pi * 2 / 5)) / 2
    assert found[:3] == [0.0, 0.5, 1.0]
    assert found[4] == pytest.approx(half)
    assert found[7] == 0.0


def test_learning_rate_rises_then_falls_and_never_leaves_its_limits():
    rates = _rates(7, max_lr=1e-4, epochs=30)
    assert rates[:71] == sorted(rates[:71])
    assert rates[70:] == sorted(rates[70:], reverse=True)
    assert min(rates) == 1e-5
    assert max(rates) == 1e-4


def test_learning_rate_moves_every_step():
    rates = _rates(5, max_lr=1e-4, epochs=20)
    assert all(one != other for one, other in pairwise(rates))


@pytest.mark.parametrize("epochs", [2, 4, 10])
def test_learning_rate_of_run_no_longer_than_its_warmup_peaks_half_way(epochs):
    rates = _rates(10, max_lr=1e-4, epochs=epochs)
    assert max(rates) == rates[5 * epochs] == 1e-4
    assert rates[0] == rates[-1] == 1e-5


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (1, 10), (10, 9), (3, 2.5)])
def test_learning_rate_of_one_step_an_epoch_ends_at_the_minimum(epochs, warmup):
    assert _rates(1, max_lr=1e-4, epochs=epochs, warmup_epochs=warmup)[-1] == 1e-5


def test_learning_rate_without_warmup_starts_at_the_maximum():
    assert learning_rate(0, 10, max_lr=1e-4, warmup_epochs=0) == 1e-4


def test_learning_rate_of_maximum_below_minimum_raises():
    with pytest.raises(ConfigError, match="maximum 1e-06 is below minimum 1e-05"):
        learning_rate(0, 10, max_lr=1e-6)


class _Mixed(nn.Module):
    """One of every kind of parameter that a backbone brings."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.classes = nn.Embedding(3, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def _names(model, group):
    return {name for name, parameter in model.named_parameters() if any(parameter is each for each in group["params"])}


def test_parameter_groups_decay_matrices_and_kernels_only():
    model = _Mixed()
    decayed, spared = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert _names(model, decayed) == {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert {"pos_embed", "classes.weight", "norm.weight", "conv.bias"} <= _names(model, spared)
    assert not any("frozen" in name for group in (decayed, spared) for name in _names(model, group))


def test_parameter_groups_of_fusion_model_spare_learned_tokens_and_share_out_everything():
    model = FusionModel(
        {"video": 4}, {"video": 3}, {"verb": 2}, missing="B.5", embed_dim=4, ffn_dim=4, n_layers=1, n_attention_heads=1
    )
    decayed, spared = parameter_groups(model, 0.01)
    assert _names(model, decayed) == {
        name for name, parameter in model.named_parameters() if name.endswith(".weight") and parameter.ndim == 2
    }
    learned = {"embedding.token_tokens.video", "embedding.modality_token.video", "block.cls"}
    assert learned <= _names(model, spared)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    torch.optim.AdamW([decayed, spared], lr=1e-4)
