"""A frozen backbone at work: bits that no neighbour moves, bfloat16 held against float32, every device named."""

import ast
import copy
import gc
import json
import weakref
from functools import cache
from pathlib import Path

import karmma.extract
import numpy as np
import pytest
import torch
from karmma import cli, cli_options
from karmma.data.cache import Cache
from karmma.data.config import DataConfig
from karmma.data.errors import KarmmaError, MemoryShortError
from karmma.data.sample import write_sample
from karmma.data.theta import theta_average
from karmma.extract.backbone import Backbone
from karmma.extract.backbones import build_backbone
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.frozen import FrozenBackbone, build_frozen
from torch.overrides import TorchFunctionMode

NAMES = {"video": "swin3d_micro", "flow": "swin3d_micro", "audio": "ast_micro", "detections": "stlt_micro"}
SHAPES = {"video": (4, 3, 32, 32), "flow": (4, 3, 32, 32), "audio": (4, 24, 32), "detections": (4, 3, 6)}
CONFIG = ExtractConfig(
    **{modality: BackboneConfig(name=name, weights="none") for modality, name in NAMES.items()}, theta=3, batch_size=4
)


def raw(modality, seed):
    """One clip by formula, of the dtype and in the range that its modality has on disk."""
    n = int(np.prod(SHAPES[modality]))
    x = np.sin(np.arange(n) * (0.3 + 0.4 * seed)).reshape(SHAPES[modality]).astype(np.float32)
    if modality == "audio":
        return x * 5 - 5
    if modality == "detections":
        x = np.abs(x)
        x[..., 5] = [0.0, 1.0, 2.0]
        return x
    return (x * 127 + 128).astype(np.uint8)


@cache
def built(modality):
    return build_backbone(NAMES[modality], modality, SHAPES[modality]).eval().requires_grad_(False)


def frozen(modality, device="cpu", backbone=None, **changes):
    return FrozenBackbone(
        modality, backbone or built(modality), CONFIG.model_copy(update=changes), torch.device(device)
    )


class Fickle(Backbone):
    """Tokens that point the other way in bfloat16."""

    def __init__(self):
        super().__init__((4,), 2, 8)
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def tokens(self, x):
        return x.to(self.weight.dtype).repeat(1, 4).view(-1, 2, 8) * (1 if self.weight.dtype == torch.float32 else -1)


class Greedy(Fickle):
    """Wants more memory than any machine has."""

    def tokens(self, x):
        return torch.empty(2**53, device=x.device)


class PretendCuda(TorchFunctionMode):
    """Does on the CPU what is asked of CUDA, and notes how it was asked."""

    def __init__(self):
        super().__init__()
        self.pinned, self.copies = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            self.pinned.append(func)
        if func is torch.Tensor.to and any(isinstance(a, torch.device) and a.type == "cuda" for a in args):
            self.copies.append(kwargs.pop("non_blocking", False))
            args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
        return func(*args, **kwargs)


@pytest.mark.parametrize("modality", ["video", "audio", "detections"])
def test_tokens_of_a_clip_are_the_same_bits_whoever_its_neighbours_are(modality):
    backbone = frozen(modality)
    together = backbone.tokens({at: raw(modality, at) for at in range(4)})
    assert list(together) == [0, 1, 2, 3]
    for at in range(4):
        alone = backbone.tokens({at: raw(modality, at)})
        assert list(alone) == [at]
        assert alone[at].tobytes() == together[at].tobytes()
    other = backbone.tokens({0: raw(modality, 7), 2: raw(modality, 2), 3: raw(modality, 8)})
    assert other[2].tobytes() == together[2].tobytes()
    assert not np.allclose(together[0], together[1], atol=1e-3)


def test_tokens_are_the_theta_averages_of_the_backbone_in_float32():
    backbone, clip = built("video"), raw("video", 1)
    with torch.inference_mode():
        whole = backbone(torch.from_numpy(clip)[None])
    found = frozen("video").tokens({2: clip})[2]
    assert found.dtype == np.float32
    assert found.shape == (3, backbone.width)
    np.testing.assert_allclose(found, theta_average(whole, 3)[0].numpy(), atol=1e-5)
    every = frozen("video", theta=None).tokens({2: clip})[2]
    np.testing.assert_allclose(every, whole[0].numpy(), atol=1e-5)
    assert frozen("video").tokens({}) == {}


def test_backbone_for_extraction_is_in_evaluation_and_has_no_gradient():
    data = DataConfig(frames=4, size=32)
    backbone = build_frozen("video", data, CONFIG)
    build_frozen.cache_clear()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


@pytest.mark.parametrize("modality", ["video", "audio", "detections"])
def test_bfloat16_is_held_against_float32_on_the_first_clips_that_are_there(modality):
    backbone, exact = frozen(modality, precision="bfloat16", batch_size=6), frozen(modality, batch_size=6)
    assert backbone.tokens({}) == {}
    assert backbone.agreement is None
    first = {at: raw(modality, at) for at in (1, 2, 3, 4, 5)}
    found, wanted = backbone.tokens(first), exact.tokens(first)
    cosines = [
        (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        for a, b in ((found[at], wanted[at]) for at in (1, 2, 3, 4))
    ]
    assert backbone.agreement["clips"] == 4
    assert backbone.agreement["least"] == pytest.approx(np.min(cosines), abs=1e-5)
    assert backbone.agreement["mean"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert 0.99 < backbone.agreement["least"] < backbone.agreement["mean"] < 1
    assert found[1].dtype == np.float32
    assert found[1].tobytes() != wanted[1].tobytes()
    assert exact.agreement is None
    before = backbone.agreement
    backbone.tokens({0: raw(modality, 9)})
    assert backbone.agreement == before


def test_float32_weights_are_left_as_they_are_and_let_go_after_the_check():
    exact = copy.deepcopy(built("audio"))
    backbone = frozen("audio", backbone=exact, precision="bfloat16")
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float32}
    gone = weakref.ref(exact)
    del exact
    assert gone() is not None
    backbone.tokens({0: raw("audio", 0)})
    gc.collect()
    assert gone() is None


def test_bfloat16_that_differs_is_refused_however_often_it_is_asked():
    backbone = frozen("audio", backbone=Fickle(), precision="bfloat16", theta=None)
    for _ in range(2):  # a cluster tries an order again in the same process
        with pytest.raises(KarmmaError, match=r"audio: in bfloat16 .* cosine of -1\.0000 .* --precision float32"):
            backbone.tokens({0: np.ones(4, np.float32)})


def test_out_of_memory_says_what_to_lower():
    with pytest.raises(MemoryShortError, match=r"the backbone of audio on cpu: .*Lower --batch-size \(4\) or"):
        frozen("audio", backbone=Greedy()).tokens({0: np.ones(4, np.float32)})


@pytest.mark.parametrize("modality", ["video", "audio", "detections"])
def test_tokens_do_not_depend_on_the_default_device(modality):
    backbone, clip = frozen(modality), raw(modality, 1)
    wanted = backbone.tokens({1: clip})[1]
    with torch.device("meta"):  # where nothing can be computed
        found = backbone.tokens({1: clip})[1]
    assert found.tobytes() == wanted.tobytes()


def test_nothing_in_the_room_takes_the_current_gpu():
    allowed = {("cluster.py", "device_count")}
    for file in Path(karmma.extract.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            assert node.attr not in ("cuda", "set_default_device", "set_device") or (
                ast.unparse(node) == "torch.cuda"
            ), f"{file.name}: {ast.unparse(node)}"
            if ast.unparse(node.value) == "torch.cuda":
                assert (file.name, node.attr) in allowed, f"{file.name}: {ast.unparse(node)}"


def test_on_cuda_batches_are_pinned_and_copied_without_waiting():
    clips = {at: raw("video", at) for at in (0, 2)}
    wanted = frozen("video").tokens(clips)
    with PretendCuda() as cuda:
        backbone = frozen("video", "cuda:1")
        cuda.copies.clear()
        found = backbone.tokens(clips)
    assert cuda.pinned == [torch.zeros]
    assert cuda.copies == [True]
    assert all(found[at].tobytes() == wanted[at].tobytes() for at in clips)


def test_on_cuda_bfloat16_is_autocast_over_float32_weights(monkeypatch):
    asked, cpu = [], torch.autocast

    def autocast(*args):
        asked.append(args)
        return cpu("cpu", *args[1:])

    monkeypatch.setattr(torch, "autocast", autocast)
    with PretendCuda():
        backbone = frozen("video", "cuda", precision="bfloat16")
        assert {parameter.dtype for parameter in backbone.backbone.parameters()} == {torch.float32}
        found = backbone.tokens({0: raw("video", 0)})[0]
    assert asked == [("cuda", torch.bfloat16)]
    assert 0.99 < backbone.agreement["least"] < 0.9999999  # the float32 half of the check is not autocast
    assert found.dtype == np.float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("modality", ["video", "audio", "detections"])
def test_backbone_and_averaging_run_on_meta(modality, precision, monkeypatch):
    taken, backbone = [], frozen(modality, "meta", copy.deepcopy(built(modality)), precision=precision)

    def back(self):
        taken.append((self.device.type, self.dtype, tuple(self.shape)))
        return torch.zeros(self.shape, dtype=self.dtype, device="cpu")

    monkeypatch.setattr(torch.Tensor, "cpu", back)  # the two things that meta cannot do
    monkeypatch.setattr(torch.Tensor, "item", lambda _: 1.0)
    tokens = backbone.tokens({1: raw(modality, 1)})
    width = backbone.backbone.width
    assert taken == [("meta", torch.float32, (4, 3, width))]
    assert tokens[1].shape == (3, width)


def run(monkeypatch, capsys, *args):
    """Run a command in this process; return exit code and stderr."""
    monkeypatch.setattr("sys.argv", ["karmma", *args])
    monkeypatch.setattr(cli_options, "err", cli_options.Console(stderr=True, highlight=False, width=300))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err


def receipts(modality):
    return [json.loads(path.read_text()) for path in Path("cache").glob(f"receipts/tokens/{modality}/*/view*/*.json")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with 8 clips of the sample; returns the command that extracts their sound."""
    write_sample(tmp_path / "sample", n_clips=8)
    monkeypatch.chdir(tmp_path)
    options = ("--config", "sample/karmma.toml", "--cache", "cache", "--modality", "audio", "--threads", "1")
    return "extract", *options, "--readers", "1", "--shard-rows", "4", "--batch-size", "2"


def test_bfloat16_says_its_cosine_and_keeps_it_in_every_receipt(here, monkeypatch, capsys):
    code, err = run(monkeypatch, capsys, *here, "--precision", "bfloat16")
    assert code in (0, None), err
    checks = [receipt["float32_check"] for receipt in receipts("audio")]
    assert len(checks) == 2
    assert checks[0] == checks[1]
    assert checks[0]["clips"] == 2
    assert 0.99 < checks[0]["least"] <= checks[0]["mean"] < 1
    told = f"a cosine of {checks[0]['mean']:.5f} to float32 (mean), {checks[0]['least']:.5f} (least)"
    assert f"audio: sampled bfloat16 tokens have {told}" in err
    code, err = run(monkeypatch, capsys, *here)
    assert "cosine" not in err
    identities = Cache.open("cache").identities("audio").values()
    assert sorted(fields["precision"] for fields in identities) == ["bfloat16", "float32"]
    first, second = ({**fields, "precision": ""} for fields in identities)
    assert first == second


def test_backbone_that_bfloat16_changes_is_refused_in_one_line_and_nothing_is_stored(here, monkeypatch, capsys):
    monkeypatch.setattr("karmma.extract.frozen.LEAST_COSINE", 0.9999999)  # what no backbone reaches
    code, err = run(monkeypatch, capsys, *here, "--precision", "bfloat16")
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("KarmmaError: audio: in bfloat16 the tokens of 2 clips have a mean cosine of")
    assert receipts("audio") == []
    assert not [path for path in Path("cache/leases").rglob("*") if path.is_file()]
