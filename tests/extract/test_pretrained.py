"""Models of the transformers library: their own tokens, the real Whisper encoder, safetensors only, no foreign code."""

import json
import wave
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from karmma.data.annotations import Clip
from karmma.data.audio import read_samples
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError, InstallationError
from karmma.data.identity import tensors_digest
from karmma.data.media import Media
from karmma.data.raw import read_clip
from karmma.data.sample import write_sample
from karmma.data.stores import TokenStore
from karmma.data.views import draw_view
from karmma.extract.backbones import build_backbone
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.stage import extract_tokens
from karmma.extract.weights import backbone_request
from safetensors.torch import load_file, save_file
from transformers.models.whisper.modeling_whisper import WhisperEncoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PICTURES = {**SIZES, "image_size": 32, "patch_size": 8}
VIT = transformers.ViTModel, transformers.ViTConfig(**PICTURES)
VIDEO_MAE = transformers.VideoMAEModel, transformers.VideoMAEConfig(**PICTURES, num_frames=4, tubelet_size=2)
TIMESFORMER = transformers.TimesformerModel, transformers.TimesformerConfig(**PICTURES, num_frames=4)
DINO = (
    transformers.Dinov2Model,
    transformers.Dinov2Config(**{**PICTURES, "intermediate_size": 0, "mlp_ratio": 2}, num_register_tokens=0),
)
WHISPER = transformers.WhisperConfig(
    d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=60, num_mel_bins=80, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip
SHAPE = (4, 3, 32, 32)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No look at the hub, and no bars of progress from it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost more here than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saved(folder, kind, config):
    """Save a model with random weights, and what its preprocessing is, as a folder; return the model."""
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained(folder)
    about = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return model


def clips(n_frames=4, side=32):
    n = 2 * n_frames * 3 * side * side
    return (torch.sin(torch.arange(n) * 0.37) * 127 + 128).to(torch.uint8).view(2, n_frames, 3, side, side)


def normalised(x):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (x / 255 - mean) / std


@pytest.mark.parametrize("model", [VIT, DINO])
def test_image_model_sees_each_frame_alone_as_its_own_preprocessing_says(tmp_path, model):
    network, x = saved(tmp_path, *model), clips()
    backbone = build_backbone(f"hf:{tmp_path}", "video", SHAPE, "pretrained").eval()
    with torch.no_grad():
        wanted = [[network(pixel_values=normalised(f)[None]).last_hidden_state[0] for f in clip] for clip in x]
        found = backbone(x)
    assert (backbone.n_tokens, backbone.width) == (4 * 17, 32)
    torch.testing.assert_close(found, torch.stack([torch.cat(frames) for frames in wanted]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model", "n_tokens"), [(VIDEO_MAE, 32), (TIMESFORMER, 65)])
def test_video_model_sees_the_clip_as_a_whole(tmp_path, model, n_tokens):
    network, x = saved(tmp_path, *model), clips()
    backbone = build_backbone(f"hf:{tmp_path}", "video", SHAPE, "pretrained").eval()
    with torch.no_grad():
        found, wanted = backbone(x), network(pixel_values=normalised(x)).last_hidden_state
    assert found.shape == (2, n_tokens, 32)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_flow_is_normalised_so_that_no_motion_is_zero(tmp_path):
    network = saved(tmp_path, *VIT)
    backbone = build_backbone(f"hf:{tmp_path}", "flow", SHAPE, "pretrained").eval()
    still = torch.tensor([128, 128, 0], dtype=torch.uint8).view(1, 1, 3, 1, 1).expand(1, *SHAPE)
    with torch.no_grad():
        wanted = network(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state
        torch.testing.assert_close(backbone(still)[:, :17], wanted, atol=1e-5, rtol=0)


def test_weights_none_are_random_under_the_seed(tmp_path):
    saved(tmp_path, *VIT)
    states = [build_backbone(f"hf:{tmp_path}", "video", SHAPE, "none", seed).state_dict() for seed in (1, 1, 2)]
    name = "network.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_folder_extracts_and_its_identity_holds_content_and_no_path(tmp_path):
    write_sample(tmp_path / "sample", n_clips=8)
    table = read_clip_table(tmp_path / "sample/clips.csv", ("verb",))
    data = DataConfig(cache=tmp_path / "cache", heads=("verb",), modalities=("video",), frames=4, size=32)

    def extract(name, **changes):
        video = BackboneConfig(name=f"hf:{tmp_path / name}", weights="pretrained")
        return extract_tokens(table, data, ExtractConfig(video=video, theta=None, batch_size=4, readers=1, **changes))

    network = saved(tmp_path / "a", *VIT)
    first = extract("a")
    clip = table.clip(3)
    array = read_clip(clip, draw_view(clip.clip_id, 0, data), ("video",), data)["video"].array
    with torch.no_grad():
        wanted = network(pixel_values=normalised(torch.from_numpy(array))).last_hidden_state.flatten(0, 1)
    found = TokenStore.open(first.stores["video"]).read(np.array([3]), 0)[0]
    np.testing.assert_allclose(found.astype(np.float32), wanted.numpy(), atol=4e-3)
    (tmp_path / "a").rename(tmp_path / "b")
    assert extract("b").n_written == 0
    assert extract("b", seed=5).n_written == 0  # nothing random is in weights that come with the model
    state = load_file(tmp_path / "b/model.safetensors")
    other = {name: tensor * 1.01 for name, tensor in state.items()}
    save_file(other, tmp_path / "b/model.safetensors", {"format": "pt"})
    assert extract("b").stores != first.stores


@pytest.mark.parametrize("part", ["model.encoder", "model", ""])
def test_whisper_checkpoint_in_any_of_its_forms_gives_its_own_encoder(tmp_path, part):
    """The hub has the whole model, for generation; others keep the encoder alone."""
    whole = saved(tmp_path / "whole", transformers.WhisperForConditionalGeneration, WHISPER)
    (whole.get_submodule(part) if part else whole).save_pretrained(tmp_path / "part")
    backbone = build_backbone(f"hf:{tmp_path / 'part'}", "audio", (2, 80, 100), "pretrained")
    own, wanted = backbone.network.state_dict(), whole.model.encoder.state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[name], wanted[name]) for name in own)


def test_checkpoint_that_lacks_a_tensor_is_refused_and_not_filled_up_at_random(tmp_path):
    saved(tmp_path, *VIT)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in sorted(state) if "key.weight" in name or "k_proj.weight" in name)
    rest = {name: tensor for name, tensor in state.items() if name != lost}
    save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"hf:.*missing"):
        build_backbone(f"hf:{tmp_path}", "video", SHAPE, "pretrained")


def test_checkpoint_of_a_classifier_gives_the_tokens_of_its_transformer_whatever_the_seed(tmp_path):
    whole, x = saved(tmp_path, transformers.ViTForImageClassification, transformers.ViTConfig(**PICTURES)), clips()
    backbones = [build_backbone(f"hf:{tmp_path}", "video", SHAPE, "pretrained", seed).eval() for seed in (1, 2)]
    digests = [tensors_digest(backbone.state_dict()) for backbone in backbones]
    assert digests[0] == digests[1]  # else the same weights would have several identities
    with torch.no_grad():
        wanted = whole.vit(pixel_values=normalised(x).flatten(0, 1)).last_hidden_state
        torch.testing.assert_close(backbones[0](x).view(8, 17, 32), wanted, atol=1e-5, rtol=1e-5)


def quiet_ended_speech(shared, path):
    """Write three seconds of real speech that fades in and out, so that nothing is heard at the ends."""
    clip = read_clip_table(shared / "data/grid/clips.csv", ("verb",)).clip(0)
    with Media(clip.video) as media:
        samples = read_samples(media, (0, 48_000), (0.0, 3.0), 16_000)
    fade = np.clip(np.minimum(np.arange(48_000), np.arange(48_000)[::-1]) / 800 - 1, 0, 1)
    samples = np.rint(samples * fade * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples)
    return samples.astype(np.float32) / 32768


def test_real_whisper_encoder_equals_transformers_own_front_end_and_encoder(shared, tmp_path):
    folder = shared / "weights/whisper_tiny_en_encoder"
    samples = quiet_ended_speech(shared, tmp_path / "speech.wav")
    data = DataConfig(
        frames=4, audio_rate=16_000, audio_hop=160, audio_window=400, audio_fft=400, audio_mels=80,
        audio_segment_s=0.75, audio_steps=75,
    )  # fmt: skip
    clip = Clip("speech", tmp_path / "speech.wav", 0.0, 3.0, {})
    array = read_clip(clip, draw_view("speech", 0, data), ("audio",), data)["audio"].array
    backbone = build_backbone(f"hf:{folder}", "audio", data.input_shape("audio"), "pretrained").eval()
    front = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    encoder = WhisperEncoder.from_pretrained(folder).eval()
    features = front(samples, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        wanted = encoder(features).last_hidden_state[:, :150]
        found = backbone(torch.from_numpy(array)[None])
    assert found.shape == (1, 150, 384)
    assert wanted.abs().max() > 5
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_whisper_on_another_spectrogram_says_what_to_set(tmp_path):
    saved(tmp_path, WhisperEncoder, WHISPER)
    for shape in ((4, 128, 75), (8, 80, 400)):
        with pytest.raises(ConfigError, match="Set audio_mels = 80, audio_hop = 160, audio_window = audio_fft = 400"):
            build_backbone(f"hf:{tmp_path}", "audio", shape, "none")


BERT = transformers.BertModel, transformers.BertConfig(**SIZES, vocab_size=50)
RESNET = transformers.ResNetModel, transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])


@pytest.mark.parametrize(
    ("model", "modality", "shape"),
    [
        (BERT, "video", SHAPE),  # takes no pictures
        (RESNET, "video", SHAPE),  # gives no tokens
        (VIDEO_MAE, "video", (8, 3, 32, 32)),  # made for 4 frames
        (VIDEO_MAE, "video", (4, 3, 64, 64)),  # made for 32 pixels
        (VIT, "audio", (4, 24, 32)),
        ((WhisperEncoder, WHISPER), "video", SHAPE),
    ],
)
def test_model_that_does_not_fit_is_refused_in_one_line(tmp_path, model, modality, shape):
    saved(tmp_path, *model)
    with pytest.raises(ConfigError, match=r"(?i)hf.*") as caught:
        build_backbone(f"hf:{tmp_path}", modality, shape, "pretrained")
    assert "\n" not in str(caught.value)


def test_folder_with_pickled_weights_only_is_refused(tmp_path):
    network = saved(tmp_path, *VIT)
    (tmp_path / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no file named model\.safetensors"):
        build_backbone(f"hf:{tmp_path}", "video", SHAPE, "pretrained")


@pytest.mark.parametrize("kind", ["evil", "vit"])
def test_code_in_the_folder_is_never_run(tmp_path, kind):
    saved(tmp_path, *VIT)
    about = json.loads((tmp_path / "config.json").read_text())
    about |= {"model_type": kind, "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    if kind == "evil":
        with pytest.raises(ConfigError, match="custom code"):
            build_backbone(f"hf:{tmp_path}", "video", SHAPE, "pretrained")
    else:
        assert build_backbone(f"hf:{tmp_path}", "video", SHAPE, "pretrained").width == 32
    assert not (tmp_path / "touched").exists()


def test_name_that_is_neither_folder_nor_within_reach_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="hf:lab/none-such cannot be loaded") as caught:
        build_backbone("hf:lab/none-such", "video", SHAPE, "pretrained")
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError):
        build_backbone(f"hf:{Path(tmp_path, 'empty')}", "video", SHAPE, "pretrained")


def test_without_transformers_one_is_told_what_to_install(monkeypatch):
    def version(name):
        if name == "transformers":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("karmma.extract.weights.version", version)
    config = ExtractConfig(video=BackboneConfig(name="hf:lab/model", weights="pretrained"))
    with pytest.raises(InstallationError, match=r"needs transformers. Install it: pip install 'karmma\[hf\]'"):
        backbone_request("video", DataConfig(), config)
