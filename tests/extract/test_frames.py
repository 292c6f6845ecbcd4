"""Transformers of timm, frame by frame: their own tokens, their own weights, and a clear no to what gives none."""

import pytest
import timm
import torch
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError
from karmma.data.raw import read_clip
from karmma.data.views import draw_view
from karmma.extract.backbones import build_backbone
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

# Model, side of the pictures, tokens a frame, tokens that stand for no place, width.
MODELS = [
    ("vit_tiny_patch16_224", 32, 4, 1, 192),
    ("deit_tiny_distilled_patch16_224", 32, 4, 2, 192),
    ("eva02_tiny_patch14_224", 28, 4, 1, 192),
    ("swin_tiny_patch4_window7_224", 64, 4, 0, 768),
    ("tiny_vit_5m_224", 64, 4, 0, 320),
]
MORE = [
    ("levit_128s", 224, 16, 0, 384),
    ("vit_small_patch16_dinov3", 32, 4, 5, 384),
    ("vit_small_patch14_reg4_dinov2", 28, 4, 5, 384),
    ("deit3_small_patch16_224", 32, 4, 1, 384),
    ("beit_base_patch16_224", 32, 4, 1, 768),
    ("cait_xxs24_224", 32, 4, 1, 192),
    ("xcit_nano_12_p16_224", 32, 4, 1, 128),
    ("swinv2_tiny_window8_256", 64, 4, 0, 768),
    ("mvitv2_tiny", 64, 4, 0, 768),
    ("hiera_tiny_224", 224, 49, 0, 768),
    ("twins_svt_small", 64, 4, 0, 512),
    ("pvt_v2_b0", 224, 49, 0, 256),
    ("davit_tiny", 224, 49, 0, 768),
    ("nest_tiny", 224, 196, 0, 384),
    ("gcvit_xxtiny", 224, 49, 0, 512),
    ("maxvit_rmlp_pico_rw_256", 256, 64, 0, 256),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost more here than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def clips(side, n_frames=3):
    """Two clips of pixels by formula, uint8 [2, T, 3, side, side]."""
    n = 2 * n_frames * 3 * side * side
    return (torch.sin(torch.arange(n) * 0.37) * 127 + 128).to(torch.uint8).view(2, n_frames, 3, side, side)


def slow_loop(network, x, n_prefix, mean, std):
    """Run a network over one frame after another; tokens [B, T * n, D]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    out = []
    for clip in x:
        frames = [network.forward_features(((frame / 255 - mean) / std)[None])[0] for frame in clip]
        frames = [frame.flatten(1).T if _is_channels_first(network, frame) else frame for frame in frames]
        frames = [frame.reshape(-1, frame.shape[-1])[n_prefix:] for frame in frames]
        out.append(torch.cat(frames))
    return torch.stack(out)


def _is_channels_first(network, features):
    return features.ndim == 3 and features.shape[0] == network.num_features != features.shape[2]


@pytest.mark.parametrize(
    ("model", "side", "n", "n_prefix", "width"), [*MODELS, *(pytest.param(*m, marks=pytest.mark.slow) for m in MORE)]
)
def test_tokens_are_those_of_the_model_on_each_frame_alone(model, side, n, n_prefix, width):
    backbone = build_backbone(f"timm:{model}", "video", (3, 3, side, side)).eval()
    assert (backbone.n_tokens, backbone.width) == (3 * n, width)
    cfg, x = timm.get_pretrained_cfg(model), clips(side)
    with torch.no_grad():
        found = backbone(x)
        wanted = slow_loop(backbone.network, x, n_prefix, cfg.mean, cfg.std)
    assert found.shape == (2, 3 * n, width)
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=1e-4)
    assert (found[0] - found[1]).abs().max() > scale / 100


def test_flow_is_normalised_so_that_no_motion_is_zero_and_sound_becomes_square_images():
    flow = build_backbone("timm:vit_tiny_patch16_224", "flow", (2, 3, 32, 32)).eval()
    still = torch.tensor([128, 128, 0], dtype=torch.uint8).view(1, 1, 3, 1, 1).expand(1, 2, 3, 32, 32)
    sound = build_backbone("timm:vit_tiny_patch16_224", "audio", (2, 24, 40)).eval()
    log_mel = torch.linspace(-10, 3, 2 * 24 * 40).view(1, 2, 24, 40)
    image = F.interpolate((log_mel[0, 1] + 4)[None, None] / 4, size=(64, 64), mode="bilinear").expand(1, 3, 64, 64)
    with torch.no_grad():
        zero = flow.network.forward_features(torch.zeros(1, 3, 32, 32))[:, 1:]
        torch.testing.assert_close(flow(still), torch.cat([zero, zero], 1), atol=1e-4, rtol=0)
        heard = sound.network.forward_features(image)[:, 1:]
        torch.testing.assert_close(sound(log_mel)[:, 16:], heard, atol=1e-4, rtol=1e-4)
    assert sound.n_tokens == 2 * 16


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        (
            "vit_tiny_patch16_244",
            32,
            r"timm has no model 'vit_tiny_patch16_244'. Did you mean 'vit_tiny_patch16_224'\?",
        ),
        ("vit_tiny_patch16_224.nonsense", 32, r"timm:vit_tiny_patch16_224.nonsense: .*Invalid pretrained tag"),
        ("resnet18", 64, r"ResNet of timm gives \[1, 512, 2, 2\], no tokens \[B, n, D\]. Choose a transformer."),
        ("convnext_atto", 64, r"ConvNeXt of timm gives .* Choose a transformer."),
        pytest.param("crossvit_tiny_240", 240, r"CrossVit of timm gives .* Choose", marks=pytest.mark.slow),
        ("vit_tiny_patch16_224", 40, r"patches of 16 pixels do not divide 40. Set size to \[32, 48\]."),
        pytest.param(
            "volo_d1_224",
            64,
            "timm:volo_d1_224: not for pictures of 64 pixels: .* Change size.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_model_that_does_not_exist_or_gives_no_tokens_is_refused(name, side, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_backbone(f"timm:{name}", "video", (2, 3, side, side))
    assert "\n" not in str(caught.value)


def test_detections_are_nothing_for_a_model_of_pictures():
    with pytest.raises(ConfigError, match="timm:vit_tiny_patch16_224 takes video, flow, audio, not detections"):
        build_backbone("timm:vit_tiny_patch16_224", "detections", (4, 3, 6))


def saved(path, model, **more):
    """Save the tensors of a model in its own size, positions large enough to matter; return them."""
    torch.manual_seed(1)
    state = timm.create_model(model, pretrained=False).state_dict()
    if "pos_embed" in state:
        state["pos_embed"] = torch.randn_like(state["pos_embed"])
    save_file({**state, **more}, path)
    return state


@pytest.mark.parametrize(
    ("model", "side", "n_before"),
    [
        ("vit_tiny_patch16_224", 64, 1),
        ("deit3_small_patch16_224", 64, 0),
        pytest.param("vit_small_patch14_reg4_dinov2", 56, 0, marks=pytest.mark.slow),
    ],
)
def test_weights_of_another_size_have_their_grid_of_positions_resampled(tmp_path, model, side, n_before):
    """n_before: positions of class and register tokens, ahead of the grid; some models have none."""
    state = saved(tmp_path / "w.safetensors", model)
    backbone = build_backbone(f"timm:{model}", "video", (2, 3, side, side), str(tmp_path / "w.safetensors"))
    before, grid = state["pos_embed"][:, :n_before], state["pos_embed"][:, n_before:]
    n = int(grid.shape[1] ** 0.5)
    square = grid.view(1, n, n, -1).permute(0, 3, 1, 2)
    wanted = F.interpolate(square, size=(4, 4), mode="bicubic", antialias=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(backbone.network.pos_embed, torch.cat([before, wanted], 1), atol=1e-5, rtol=0)
    own = backbone.network.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own if name != "pos_embed")


@pytest.mark.parametrize(
    "model",
    ["deit_tiny_distilled_patch16_224", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)],
)
def test_weights_of_the_same_size_come_as_they_are_without_any_head(tmp_path, model):
    state = saved(tmp_path / "w.safetensors", model)
    assert any(name.startswith("head") for name in state)
    backbone = build_backbone(f"timm:{model}", "video", (2, 3, 224, 224), str(tmp_path / "w.safetensors"))
    own = backbone.network.state_dict()
    assert not any(name.startswith("head") for name in own)
    assert all(torch.equal(own[name], state[name]) for name in own)


def test_weights_of_another_kind_of_model_are_refused(tmp_path):
    saved(tmp_path / "w.safetensors", "vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=r"for timm:levit_128s: .* missing .* unexpected"):
        build_backbone("timm:levit_128s", "video", (2, 3, 224, 224), str(tmp_path / "w.safetensors"))


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("karmma.extract.frames.timm.create_model", unreachable)
    with pytest.raises(
        ConfigError, match=r"timm:vit_tiny_patch16_224: its weights cannot be fetched: no route to host"
    ):
        build_backbone("timm:vit_tiny_patch16_224", "video", (2, 3, 32, 32), "pretrained")


def test_dinov2_on_a_real_clip_is_the_recipe_beside_its_weights(shared):
    file, size = shared / "weights/vit_small_patch14_dinov2.safetensors", 112
    table = read_clip_table(shared / "data/grid/clips.csv", ("verb",))
    data = DataConfig(frames=2, size=size)
    array = read_clip(table.clip(0), draw_view("x", 0, data), ("video",), data)["video"].array
    x = torch.from_numpy(array)[None]
    state = load_file(file)
    grid = [size // 14, size // 14]
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"].float(), grid, antialias=False)
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=size).eval()
    model.load_state_dict(state, strict=True)
    name = "timm:vit_small_patch14_dinov2"
    backbone = build_backbone(name, "video", (2, 3, size, size), str(file)).eval()
    with torch.no_grad():
        found = backbone(x)
        wanted = slow_loop(model, x, 1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert found.shape == (1, 2 * 64, 384)
    assert {tensor.dtype for tensor in backbone.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
