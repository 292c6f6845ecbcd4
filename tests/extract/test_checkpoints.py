"""Weights files: torchvision's and the Video-Swin authors' names, every format, and never a line of code run."""

import io
import os
import pickle
import zipfile
from functools import cache
from math import isqrt

import numpy as np
import pytest
import torch
from karmma.data.errors import ConfigError
from karmma.data.identity import tensors_digest
from karmma.data.tensors import read_tensors
from karmma.extract.backbones import build_backbone
from karmma.extract.checkpoints import torchvision_names
from safetensors.torch import save_file
from torchvision.models.video import swin3d_t
from torchvision.models.video.swin_transformer import SwinTransformer3d

SHAPE = (4, 3, 64, 64)
# What a small Swin is in torchvision's words.
MICRO = {
    "patch_size": [2, 8, 8], "embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "window_size": [4, 3, 3],
    "mlp_ratio": 2.0,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost more here than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def theirs(name="swin3d_micro"):
    """torchvision's own network with a head for 400 classes, bias tables large enough to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = swin3d_t(weights=None) if name == "swin3d_t" else SwinTransformer3d(**MICRO)
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.endswith("bias_table"):
                torch.nn.init.normal_(parameter)
    return network.eval()


@cache
def wanted(name="swin3d_micro"):
    """torchvision's tokens [2, K, D] of the clips."""
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    network = theirs(name)
    with torch.no_grad():
        x = network.pos_drop(network.patch_embed((clips().transpose(1, 2) / 255 - mean) / std))
        return network.norm(network.features(x)).flatten(1, 3)


def clips():
    n = 2 * int(np.prod(SHAPE))
    return (torch.sin(torch.arange(n) * 0.37) * 127 + 128).to(torch.uint8).view(2, *SHAPE)


def authors_names(state, prefix="backbone."):
    """Return torchvision's tensors under the names of github SwinTransformer/Video-Swin-Transformer, written anew.

    There a stage is `layers.i`: its blocks, and then `downsample`; the MLP is fc1 and fc2; each attention has an index.
    """
    out = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            out["cls_head.fc_cls." + name.removeprefix("head.")] = tensor
            continue
        words = name.split(".")
        if words[0] == "features":
            stage, is_merging = divmod(int(words[1]), 2)
            words = ["layers", str(stage), *(["downsample"] if is_merging else ["blocks"]), *words[2:]]
        new = ".".join(words).replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        if new.endswith("relative_position_index"):
            side = isqrt(tensor.numel())
            tensor = tensor.view(side, side)  # theirs is a table, torchvision's is flat
        out[prefix + new] = tensor
    return out


def loaded(state, path, wrap=None, name="swin3d_micro"):
    """Save tensors, build a backbone from the file, and return its tokens of the clips."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({wrap: state, "meta": {"epoch": 30, "config": "model = dict()"}} if wrap else state, path)
    backbone = build_backbone(name, "video", SHAPE, str(path)).eval()
    with torch.no_grad():
        return backbone(clips())


def test_torchvisions_own_file_gives_torchvisions_tokens(tmp_path):
    found = loaded(theirs().state_dict(), tmp_path / "swin3d-7615ae03.pth")
    assert found.shape == (2, 2 * 4 * 4, 96)
    torch.testing.assert_close(found, wanted(), atol=1e-4, rtol=1e-4)


def test_published_swin_t_of_the_authors_gives_torchvisions_tokens(tmp_path):
    state = authors_names(theirs("swin3d_t").state_dict())
    assert state["backbone.layers.0.blocks.0.attn.relative_position_index"].shape == (392, 392)
    assert state["backbone.layers.2.downsample.reduction.weight"].shape == (768, 1536)
    assert state["backbone.layers.3.blocks.1.mlp.fc2.bias"].shape == (768,)
    assert state["cls_head.fc_cls.weight"].shape == (400, 768)
    found = loaded(state, tmp_path / "swin_tiny_patch244_window877_kinetics400_1k.pth", "state_dict", "swin3d_t")
    torch.testing.assert_close(found, wanted("swin3d_t"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("file", "prefix", "wrap"),
    [
        ("saved_by_mmaction.pth", "backbone.", "state_dict"),
        ("bare.safetensors", "", None),
        ("trained_in_parallel.pt", "module.backbone.", "model"),
    ],
)
def test_checkpoint_with_the_authors_names_gives_the_same_tokens(tmp_path, file, prefix, wrap):
    state = authors_names(theirs().state_dict(), prefix)
    assert f"{prefix}layers.0.blocks.0.attn.relative_position_bias_table" in state
    torch.testing.assert_close(loaded(state, tmp_path / file, wrap), wanted(), atol=1e-4, rtol=1e-4)


def test_the_same_weights_have_one_digest_under_whatever_names_they_came(tmp_path):
    own = {name: tensor for name, tensor in theirs().state_dict().items() if not name.startswith("head.")}
    save_file(authors_names(own), tmp_path / "authors.safetensors")
    torch.save(own, tmp_path / "torchvision.pth")
    digests = [
        tensors_digest(build_backbone("swin3d_micro", "video", SHAPE, str(tmp_path / name)).state_dict())
        for name in ("authors.safetensors", "torchvision.pth")
    ]
    assert digests[0] == digests[1] == tensors_digest(own)


def test_names_of_torchvision_pass_through_and_only_the_head_is_left_out():
    state = theirs().state_dict()
    kept = torchvision_names(state)
    assert set(state) - set(kept) == {"head.weight", "head.bias"}
    assert all(kept[name] is state[name] for name in kept)


def changed(**tensors):
    """The authors' checkpoint with some tensors (None: without them) of the first block."""
    state = authors_names(theirs().state_dict())
    for name, tensor in tensors.items():
        state[f"backbone.layers.0.blocks.0.attn.{name}"] = tensor
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        # Windows of 8 frames, as Swin-B of Something-Something V2 has twice as many as that of Kinetics.
        (
            lambda: changed(relative_position_bias_table=torch.zeros(15 * 5 * 5, 3)),
            r"1 of another shape \(features.0.0.attn.relative_position_bias_table: \[375, 3\], not \[175, 3\]\)",
        ),
        (lambda: changed(**{"proj.weight": None}), r"1 missing \(features.0.0.attn.proj.weight\)"),
        (lambda: changed(**{"extra.weight": torch.ones(2)}), r"1 unexpected \(features.0.0.attn.extra.weight\)"),
    ],
    ids=["another window", "a tensor missing", "a tensor too many"],
)
def test_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, state, message):
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(state(), tmp_path / "w.pth", "state_dict")
    assert "Choose the backbone and input size they were made for." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpoint_of_another_size_of_swin_is_refused(tmp_path):
    torch.save({"state_dict": authors_names(theirs().state_dict())}, tmp_path / "micro.pth")
    with pytest.raises(ConfigError, match=r"for swin3d_t: \d+ missing .*; \d+ of another shape"), torch.device("meta"):
        build_backbone("swin3d_t", "video", SHAPE, str(tmp_path / "micro.pth"))


class Touch:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def as_plain_pickle(path, hostile):
    path.write_bytes(pickle.dumps({"norm.weight": hostile}, protocol=2))


def as_saved_by_torch(path, hostile):
    torch.save({"state_dict": {"norm.weight": torch.ones(3)}, "optimizer": hostile}, path)


def as_old_torch_file(path, hostile):
    torch.save({"norm.weight": hostile}, path, _use_new_zipfile_serialization=False)


def as_torchscript(path, hostile):
    """A zip with a data.pkl of one's own, as torch.load would find it."""
    plain = io.BytesIO()
    torch.save({"norm.weight": torch.ones(3)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            is_pickle = name.endswith("data.pkl")
            target.writestr(
                name, pickle.dumps({"norm.weight": hostile}, protocol=2) if is_pickle else source.read(name)
            )


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("write", [as_plain_pickle, as_saved_by_torch, as_old_torch_file, as_torchscript])
def test_hostile_file_is_refused_and_nothing_in_it_is_run(tmp_path, write, suffix):
    path, mark = tmp_path / f"hostile{suffix}", tmp_path / "touched"
    write(path, Touch(mark))
    with pytest.raises(ConfigError, match=r"hostile.* not a readable weights file: .* Save it again as .safetensors"):
        build_backbone("swin3d_micro", "video", (8, 3, 48, 48), str(path))
    assert not mark.exists()


def test_hostile_file_would_have_run_its_code(tmp_path):
    """So that the test above can fail."""
    as_saved_by_torch(tmp_path / "hostile.pth", Touch(tmp_path / "touched"))
    torch.load(tmp_path / "hostile.pth", weights_only=False)
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(tmp_path, dtype):
    state = build_backbone("ast_micro", "audio", (8, 48, 48), seed=5).state_dict()
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "w.safetensors")
    found = build_backbone("ast_micro", "audio", (8, 48, 48), str(tmp_path / "w.safetensors")).state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], state[name].to(dtype).float()) for name in state)


@pytest.mark.parametrize("content", [{"state_dict": {"epoch": 3}}, {"a": torch.ones(1), "b": "text"}, [torch.ones(1)]])
def test_file_that_holds_more_than_tensors_by_name_says_so(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="expected tensors by name, found something else"):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch wonders about some of them
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_damaged_file_is_refused_in_one_line_or_read(tmp_path, suffix):
    rng, path = np.random.default_rng(0), tmp_path / f"w{suffix}"
    state, old = (
        {"a.weight": torch.ones(4, 3), "b": torch.ones(5)},
        {"_use_new_zipfile_serialization": suffix == ".pth"},
    )
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path, **old)
    whole, said = path.read_bytes(), []
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged[: len(whole) - int(rng.integers(0, 2) * rng.integers(0, len(whole)))])
        try:
            read_tensors(path)
        except ConfigError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in said)
