import pytest
import torch
from karmma.extract.video_swin import FusedWindowAttention, VideoSwin, WindowPlan, plan_windows, swin_network
from torch import nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

SIZES = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window": (2, 3, 3), "mlp_ratio": 2.0}


def formula(*shape):
    return torch.sin(torch.arange(torch.Size(shape).numel()) * 0.7).view(shape)


def torchvision_network(stochastic_depth):
    sizes = {**SIZES, "patch_size": (2, 4, 4), "window_size": SIZES["window"]}
    del sizes["window"]
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}
    return SwinTransformer3d(**lists, stochastic_depth_prob=stochastic_depth, num_classes=1)


def pair(grid, stochastic_depth=0.0):
    """Our network and torchvision's own with the same weights, the bias tables large enough to matter."""
    torch.manual_seed(0)
    slow, fast = torchvision_network(stochastic_depth), swin_network(**SIZES, stochastic_depth=stochastic_depth)
    for name, parameter in slow.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    fast.load_state_dict(slow.state_dict())
    plan_windows(fast.features, grid)
    return slow, fast


def tokens(network, x):
    return network.norm(network.features(network.patch_embed(x)))


def test_window_plan_of_four_places_shifted_by_one_is_the_one_on_paper():
    plan = WindowPlan((1, 1, 4), (1, 1, 2), (0, 0, 1))
    # Rolled by one: 1 2 3 0, so the windows are (1, 2) and (3, 0), and 3 and 0 were no neighbours.
    assert plan.source.tolist() == [1, 2, 3, 0]
    assert plan.n_windows == [1, 1]
    assert plan.mask.tolist() == [[[0, 0], [0, 0]], [[0, -100], [-100, 0]]]


def test_window_plan_shifts_nothing_along_an_axis_that_one_window_covers():
    plan = WindowPlan((1, 3, 2), (2, 3, 7), (1, 1, 3))
    assert plan.window == (1, 3, 2)
    assert plan.source.tolist() == list(range(6))
    assert plan.mask.tolist() == torch.zeros(1, 6, 6).tolist()


def test_window_plan_pads_with_zeros_what_juts_out():
    plan = WindowPlan((1, 1, 3), (1, 1, 2), (0, 0, 0))
    assert plan.split(torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3, 1)).flatten(1).tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize("size", [(4, 6, 6), (5, 7, 4), (1, 3, 8)])
def test_window_plan_join_undoes_split_for_every_clip(size):
    plan = WindowPlan(size, (2, 3, 3), (1, 1, 1))
    x = formula(3, *size, 2)
    assert torch.equal(plan.join(plan.split(x), 3), x)


# Grids of patches: whole windows; padding along every axis; a window that covers time, and stages of odd sides.
@pytest.mark.parametrize("grid", [(4, 6, 6), (5, 7, 4), (2, 9, 5), (3, 13, 10)])
def test_fused_attention_equals_torchvision_values_and_gradients(grid):
    slow, fast = pair(grid)
    x = formula(2, 3, grid[0] * 2 - 1, grid[1] * 4 - 2, grid[2] * 4).requires_grad_()
    wanted, found = tokens(slow, x), tokens(fast, x)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(tokens(fast, x), wanted, atol=1e-4, rtol=0)

    weights = formula(*wanted.shape)  # a plain sum after a LayerNorm has no gradient
    names = [name for name, _ in slow.named_parameters() if not name.startswith("head.")]
    gradients = [
        torch.autograd.grad((out * weights).sum(), [x, *(net.get_parameter(name) for name in names)])
        for net, out in ((slow, wanted), (fast, found))
    ]
    for name, ours, theirs in zip(["input", *names], gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert theirs.abs().max() > 0, name


def test_fused_attention_of_frozen_weights_passes_the_gradient_to_its_input():
    slow, fast = pair((5, 7, 4))
    x = formula(1, 3, 10, 28, 16).requires_grad_()
    found = [
        torch.autograd.grad((out * formula(*out.shape)).sum(), x)[0]
        for out in (tokens(net.requires_grad_(False), x) for net in (slow, fast))
    ]
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_stochastic_depth_in_training_stays_torchvisions():
    slow, fast = (net.train() for net in pair((4, 6, 6), stochastic_depth=0.5))
    x, found = formula(4, 3, 8, 24, 24), []
    for net in (slow, fast, fast):
        torch.manual_seed(1 if len(found) < 2 else 2)
        found.append(tokens(net, x))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=0)
    assert not torch.allclose(found[2], found[1], atol=1e-2)


def test_bias_changed_in_place_shows_at_once_in_inference():
    _, fast = pair((4, 6, 6))
    x = formula(1, 3, 8, 24, 24)
    with torch.no_grad():
        before = tokens(fast, x)
        for layer in fast.modules():
            if isinstance(layer, FusedWindowAttention):
                layer.relative_position_bias_table.data.mul_(-1)  # `.data` leaves no trace in a version counter
        assert not torch.allclose(tokens(fast, x), before, atol=1e-3)


def swin(modality, shape):
    torch.manual_seed(0)
    return VideoSwin(swin_network(**SIZES), modality, shape)


def test_video_pixels_are_normalised_as_for_the_kinetics_weights():
    raw = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    raw[:, 1] = 255
    x = swin("video", (2, 3, 4, 4)).pixels(raw)
    assert x.shape == (1, 3, 2, 4, 4)
    torch.testing.assert_close(x[0, :, 0, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    torch.testing.assert_close(x[0, :, 1, 0, 0], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))


def test_flow_without_motion_is_zero_in_every_channel():
    raw = torch.tensor([128, 128, 0], dtype=torch.uint8).view(1, 1, 3, 1, 1).expand(1, 2, 3, 4, 4)
    x = swin("flow", (2, 3, 4, 4)).pixels(raw)
    torch.testing.assert_close(x, torch.zeros(1, 3, 2, 4, 4), atol=1e-6, rtol=0)


def test_sound_becomes_square_images_with_three_equal_channels():
    backbone = swin("audio", (4, 5, 30))
    log_mel = torch.linspace(-10, 3, 30).expand(1, 4, 5, 30)
    x = backbone.pixels(log_mel)
    assert x.shape == (1, 3, 4, 32, 32)  # 30 rounded up to whole patches after the one merging: 8
    assert torch.equal(x[:, 0], x[:, 2])
    torch.testing.assert_close(x[0, 0, 0, 0, [0, -1]], torch.tensor([-1.5, 1.75]), atol=0.02, rtol=0)
    assert backbone.n_tokens == 2 * 4 * 4
    assert backbone(log_mel).shape == (1, 32, 16)


def test_state_dict_has_torchvisions_names_without_the_head():
    wanted = {name for name in torchvision_network(0.0).state_dict() if not name.startswith("head.")}
    assert set(swin("video", (4, 3, 24, 24)).state_dict()) == wanted
