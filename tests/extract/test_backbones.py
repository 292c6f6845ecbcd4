from dataclasses import replace

import pytest
import torch
from karmma.data.errors import ConfigError, KarmmaError
from karmma.data.identity import tensors_digest
from karmma.extract.backbones import BACKBONES, build_backbone, fetched
from safetensors.torch import save_file
from torch import nn

VIDEO, SOUND, BOXES = (32, 3, 224, 224), (32, 128, 224), (32, 8, 6)
SMALL = {"video": (8, 3, 48, 48), "flow": (8, 3, 48, 48), "audio": (8, 48, 48), "detections": (8, 8, 6)}
MICRO = [(name, modality) for name in BACKBONES if "micro" in name for modality in BACKBONES[name].modalities]
# name, modality, shape -> parameters, tokens, width; the first three numbers are the published ones.
FULL = [
    ("swin3d_t", "video", VIDEO, 27_850_470, 784, 768),
    ("swin3d_b", "flow", VIDEO, 87_638_984, 784, 1024),
    ("ast_t", "audio", SOUND, 6_960_960, 253, 192),
    ("swin3d_b", "audio", SOUND, 87_638_984, 784, 1024),
    ("swin3d_s", "video", VIDEO, 49_509_078, 784, 768),
    ("stlt_12", "detections", BOXES, 85_093_632, 33, 768),
    ("stlt_9", "detections", BOXES, 63_830_016, 33, 768),
]


def raw_batch(modality, batch=2):
    """Raw clips by formula, each of another frequency, of the dtype and in the range that they have on disk."""
    places = torch.arange(torch.Size(SMALL[modality]).numel()).view(SMALL[modality])
    x = torch.stack([torch.sin(places * (0.3 + 0.4 * clip)) for clip in range(batch)])
    if modality == "audio":
        return x * 5 - 5
    if modality == "detections":
        x = x.abs()
        x[..., 5] = torch.tensor([0.0, 1.0, 2.0, 2.0, 0.0, 1.0, 0.0, 0.0])
        return x
    return (x * 127 + 128).to(torch.uint8)


def weighted_sum(tokens):
    """A loss of which no gradient vanishes: behind a LayerNorm a plain sum has none."""
    return (tokens * torch.cos(torch.arange(tokens.numel()) * 1.3).view(tokens.shape)).sum()


@pytest.fixture(scope="module")
def ast_file(tmp_path_factory):
    """The tensors of a small AST as a safetensors file, with a classification head that has to go."""
    state = build_backbone("ast_micro", "audio", SMALL["audio"], seed=5).state_dict()
    path = tmp_path_factory.mktemp("weights") / "ast.safetensors"
    save_file({**state, "head.weight": torch.ones(2, 3)}, path)
    return path


@pytest.mark.parametrize(("name", "modality"), MICRO)
def test_backbone_gives_the_tokens_it_promises_and_the_same_ones_twice(name, modality):
    backbone, x = build_backbone(name, modality, SMALL[modality]).eval(), raw_batch(modality)
    with torch.no_grad():
        tokens = backbone(x)
        assert tokens.shape == (2, backbone.n_tokens, backbone.width)
        assert tokens.dtype == torch.float32
        assert tokens.isfinite().all()
        assert torch.equal(backbone(x), tokens)
        torch.testing.assert_close(backbone(x[1:]), tokens[1:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-2)


@pytest.mark.parametrize(("name", "modality"), MICRO)
def test_backbone_in_training_gives_every_parameter_a_gradient(name, modality):
    backbone = build_backbone(name, modality, SMALL[modality])
    weighted_sum(backbone(raw_batch(modality))).backward()
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize(("name", "modality"), MICRO)
def test_frozen_backbone_passes_the_gradient_to_its_input(name, modality):
    backbone = build_backbone(name, modality, SMALL[modality]).eval().requires_grad_(False)
    x = raw_batch(modality).float().requires_grad_()
    weighted_sum(backbone(x)).backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize(("name", "modality"), [pair for pair in MICRO if pair != ("swin3d_micro", "flow")])
def test_micro_backbone_overfits_a_batch_within_40_steps(name, modality):
    backbone, x = build_backbone(name, modality, SMALL[modality], seed=1), raw_batch(modality, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head, labels = nn.Linear(backbone.width, 4), torch.arange(4)
        optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=2e-3)
        for _ in range(40):
            loss = nn.functional.cross_entropy(head(backbone(x).mean(1)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss < 0.2


@pytest.mark.parametrize(("name", "modality", "shape", "n_parameters", "n_tokens", "width"), FULL)
def test_backbone_of_the_paper_has_the_published_size(name, modality, shape, n_parameters, n_tokens, width):
    with torch.device("meta"):
        backbone = build_backbone(name, modality, shape)
        tokens = backbone(torch.empty(2, *shape))
    assert sum(parameter.numel() for parameter in backbone.parameters()) == n_parameters
    assert (backbone.n_tokens, backbone.width) == (n_tokens, width)
    assert tokens.shape == (2, n_tokens, width)


def test_every_registered_backbone_is_tested():
    assert {name for name, *_ in FULL} | {name for name, _ in MICRO} == set(BACKBONES)


def test_seed_decides_the_weights_and_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    digests = [
        tensors_digest(build_backbone("stlt_micro", "detections", SMALL["detections"], seed=s).state_dict())
        for s in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "modality", "shape", "message"),
    [
        ("swin3d_tt", "video", VIDEO, "Unknown backbone 'swin3d_tt'. Did you mean 'swin3d_t'?"),
        ("swin3d_t", "vidoe", VIDEO, "Unknown modality 'vidoe'. Did you mean 'video'?"),
        ("ast_t", "video", VIDEO, "ast_t takes audio, not video. For video choose one of swin3d_t, swin3d_s"),
        ("swin3d_t", "detections", BOXES, "For detections choose one of stlt_12, stlt_9, stlt_micro."),
        ("swin3d_t", "video", SOUND, r"video comes as \[T, 3, H, W\], not as \[32, 128, 224\]"),
        ("swin3d_t", "flow", (32, 2, 224, 224), r"flow comes as \[T, 3, H, W\], not as \[32, 2, 224, 224\]"),
        ("stlt_9", "detections", (32, 8, 5), r"detections comes as \[T, n, 6\], not as \[32, 8, 5\]"),
    ],
)
def test_build_backbone_from_what_does_not_go_together_says_so(name, modality, shape, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(name, modality, shape)


def test_backbone_on_clips_of_another_shape_says_so():
    backbone = build_backbone("ast_micro", "audio", SMALL["audio"])
    with pytest.raises(KarmmaError, match=r"built for clips of shape \[8, 48, 48\], got \[8, 48, 40\]"):
        backbone(torch.zeros(1, 8, 48, 40))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("kinetics400", "no kinetics400 weights for ast_micro, only for swin3d_t, swin3d_s, swin3d_b"),
        ("kinetics", "Unknown weights 'kinetics' for ast_micro: neither none nor a file"),
        ("nowhere/ast.pth", "nowhere/ast.pth: no such weights file"),
    ],
)
def test_weights_that_do_not_exist_say_so(weights, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone("ast_micro", "audio", SMALL["audio"], weights)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_from_a_file_are_used_without_the_head(suffix, tmp_path, ast_file):
    wanted = build_backbone("ast_micro", "audio", SMALL["audio"], seed=5)
    path = ast_file
    if suffix != ".safetensors":
        path = tmp_path / f"ast{suffix}"
        torch.save({**wanted.state_dict(), "head.bias": torch.ones(3)}, path)
    found = build_backbone("ast_micro", "audio", SMALL["audio"], str(path))
    assert tensors_digest(found.state_dict()) == tensors_digest(wanted.state_dict())


def test_weights_of_another_backbone_name_file_and_tensors(ast_file):
    with pytest.raises(ConfigError) as caught:
        build_backbone("stlt_micro", "detections", SMALL["detections"], str(ast_file))
    assert str(caught.value).startswith(f"weights '{ast_file}' for stlt_micro: 47 missing (box.bias, box.weight, ")
    assert "43 unexpected (vit.blocks.0.attn.proj.bias, " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_for_another_input_size_name_both_shapes(ast_file):
    with pytest.raises(ConfigError, match=r"1 of another shape \(vit.pos_embed: \[1, 51, 96\], not \[1, 44, 96\]\)"):
        build_backbone("ast_micro", "audio", (8, 48, 42), str(ast_file))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_file_that_is_damaged_says_so(suffix, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"no tensors in here")
    with pytest.raises(ConfigError, match="not a readable weights file") as caught:
        build_backbone("ast_micro", "audio", SMALL["audio"], str(path))
    assert "\n" not in str(caught.value)


def test_weights_file_that_holds_code_is_refused(tmp_path):
    path = tmp_path / "code.pth"
    torch.save({"cls_token": nn.Linear(1, 1)}, path)
    with pytest.raises(ConfigError, match="not a readable weights file"):
        build_backbone("ast_micro", "audio", SMALL["audio"], str(path))


def test_weights_file_without_tensors_says_so(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "run.pth")
    with pytest.raises(ConfigError, match="expected tensors by name"):
        build_backbone("ast_micro", "audio", SMALL["audio"], str(tmp_path / "run.pth"))


class Published:
    """Stands for torchvision's entry of published weights."""

    url = "https://example.org/swin.pth"

    def __init__(self, answer):
        self.answer = answer

    def get_state_dict(self, progress, check_hash, weights_only):
        assert check_hash
        assert weights_only
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_published_weights_are_used_without_the_head(monkeypatch):
    wanted = build_backbone("swin3d_micro", "video", SMALL["video"], seed=5)
    published = Published({**wanted.state_dict(), "head.weight": torch.ones(400, 64), "head.bias": torch.ones(400)})
    recipe = replace(BACKBONES["swin3d_micro"], named={"kinetics400": lambda: fetched(published)})
    monkeypatch.setitem(BACKBONES, "swin3d_micro", recipe)
    # The same weights serve sound: the images are made to fit.
    found = build_backbone("swin3d_micro", "audio", SMALL["audio"], "kinetics400")
    assert tensors_digest(found.state_dict()) == tensors_digest(wanted.state_dict())


def test_published_weights_out_of_reach_say_what_to_do(monkeypatch):
    unreachable = Published(OSError("no route to host"))
    recipe = replace(BACKBONES["swin3d_micro"], named={"kinetics400": lambda: fetched(unreachable)})
    monkeypatch.setitem(BACKBONES, "swin3d_micro", recipe)
    with pytest.raises(ConfigError, match=r"swin.pth: cannot be fetched: no route to host. Fetch it elsewhere"):
        build_backbone("swin3d_micro", "video", SMALL["video"], "kinetics400")


def with_state(**tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module
