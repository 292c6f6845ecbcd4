"""Transformers of the transformers library as backbones: image models per frame, video models, Whisper's encoder."""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.errors import ConfigError, InstallationError, one_line
from .backbone import Backbone
from .video_swin import FLOW_MEAN, FLOW_STD, VIDEO_MEAN, VIDEO_STD

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

VIDEO_MODELS = ("videomae", "vivit", "timesformer")
WHISPER_HOP = 160
# log10 of the least power that Whisper's recipe knows, and how far below the loudest it cuts off.
WHISPER_FLOOR, WHISPER_RANGE = -10.0, 8.0


class PretrainedPictures(Backbone):
    """An image or video model over the frames of a clip: tokens [B, K, D] in the model's order, special ones too."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: "PreTrainedModel", modality: str, input_shape: tuple[int, ...], norm: dict[str, Any]
    ) -> None:
        takes_video = network.config.model_type in VIDEO_MODELS
        accepted = inspect.signature(network.forward).parameters
        options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        frames = torch.zeros(1, *input_shape) if takes_video else torch.zeros(1, *input_shape[1:])
        kind = network.config.model_type
        if network.main_input_name != "pixel_values":
            raise ConfigError(f"hf model {kind} takes {network.main_input_name}, not {modality}. Choose another.")
        try:
            with torch.no_grad():
                found = network(pixel_values=frames, **options).last_hidden_state
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"hf model {kind}: not for clips of {list(input_shape)}: {one_line(error)}") from None
        if found.ndim != 3:
            raise ConfigError(f"hf model {kind} gives {list(found.shape)}, no tokens [B, n, D]. Choose a transformer.")
        super().__init__(input_shape, found.shape[1] * (1 if takes_video else input_shape[0]), found.shape[2])
        self.network, self.takes_video, self.options = network, takes_video, options
        mean, std = (norm.get("image_mean", VIDEO_MEAN), norm.get("image_std", VIDEO_STD))
        mean, std = (FLOW_MEAN, FLOW_STD) if modality == "flow" else (mean, std)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def tokens(self, x: Tensor) -> Tensor:
        """Turn pixels 0..255 [B, T, 3, H, W] into tokens [B, K, D]."""
        pixels = (x.to(self.mean.dtype) / 255 - self.mean) / self.std
        pixels = pixels if self.takes_video else pixels.flatten(0, 1)
        found = self.network(pixel_values=pixels, **self.options).last_hidden_state
        return found.reshape(x.shape[0], -1, found.shape[-1])


class WhisperTokens(Backbone):
    """Whisper's encoder over the sound of a clip: one token for every two steps of the spectrogram.

    The T segments are put end to end; they are the clip's sound, without gaps or repetition, where `audio_segment_s`
    is the length of a clip divided by `frames`; with `audio_fft` and `audio_window` 400 they are Whisper's.  The rest
    of what the encoder has positions for, 30 s as published, is silence, whose tokens are left out.
    """

    def __init__(self, network: "WhisperEncoder", input_shape: tuple[int, ...]) -> None:
        n_frames, mels, steps = input_shape
        wanted, most = network.config.num_mel_bins, 2 * network.config.max_source_positions
        if mels != wanted or n_frames * steps > most:
            raise ConfigError(
                f"Whisper takes {wanted} mel bins, at most {most} steps; audio comes as {n_frames} x {mels} x "
                f"{steps}. Set audio_mels = {wanted}, audio_hop = {WHISPER_HOP}, audio_window = audio_fft = 400, and "
                "audio_segment_s to the length of a clip divided by frames."
            )
        super().__init__(input_shape, -(-n_frames * steps // 2), network.config.d_model)
        self.network, self.n_steps = network, most

    def tokens(self, x: Tensor) -> Tensor:
        """Turn log10 mel power [B, T, mels, steps] into tokens [B, ceil(T * steps / 2), D].

        Source: log_mel_spectrogram of openai/whisper: floor, 8 below the maximum, (x + 4) / 4, silence up to the end.
        """
        parameter = next(self.network.parameters())
        sound = x.float().permute(0, 2, 1, 3).flatten(2)  # [B, mels, T * steps]
        sound = F.pad(sound.clamp_min(WHISPER_FLOOR), (0, self.n_steps - sound.shape[2]), value=WHISPER_FLOOR)
        sound = torch.maximum(sound, sound.amax((1, 2), keepdim=True) - WHISPER_RANGE)
        features = ((sound + 4) / 4).to(parameter.dtype)
        return self.network(features).last_hidden_state[:, : self.n_tokens]


def build_pretrained(model: str, modality: str, input_shape: tuple[int, ...], with_weights: bool) -> Backbone:
    """Build `hf:<model>`, a local folder or a name on the hub, with its own weights or with random ones.

    Only safetensors are read and no code of the model's is run.  Raises InstallationError without transformers,
    ConfigError if there is no such model or it does not fit the modality.
    """
    try:
        import transformers
    except ImportError:
        raise InstallationError("hf: backbones need transformers. Install it: pip install 'karmma[hf]'.") from None
    transformers.logging.disable_progress_bar()  # ours is enough, and so are our own words on what a file lacks
    transformers.logging.set_verbosity_error()
    is_folder = Path(model).is_dir()
    where = {"trust_remote_code": False, "local_files_only": is_folder}
    try:
        config = transformers.AutoConfig.from_pretrained(model, **where)
        if (config.model_type == "whisper") != (modality == "audio"):
            raise ConfigError(f"hf:{model} is a {config.model_type}, which does not take {modality}. Choose another.")
        network = _with_own_weights(model, config, where) if with_weights else _at_random(config)
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"hf:{model} cannot be loaded: {one_line(error)}") from None
    if any(True for _ in getattr(network, "pooler", nn.Identity()).parameters()):  # behind the tokens; most lack it
        network.register_module("pooler", None)
    network.eval()
    if config.model_type == "whisper":
        return WhisperTokens(cast("WhisperEncoder", network), input_shape)
    return PretrainedPictures(network, modality, input_shape, _normalisation(model, where))


def _at_random(config: Any) -> "PreTrainedModel":
    """Return the network of a config, of Whisper the encoder alone."""
    import transformers

    network = transformers.AutoModel.from_config(config)
    return network.encoder if config.model_type == "whisper" else network


def _with_own_weights(model: str, config: Any, where: dict[str, Any]) -> "PreTrainedModel":
    """Return a network with all its tensors from its checkpoint; raise ConfigError if one is missing there."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    # A checkpoint of Whisper may be the whole or the encoder alone; of any other model it is what it says.
    whole: list[tuple[Any, str]] = [(transformers.AutoModel, "encoder." if config.model_type == "whisper" else "")]
    for kind, part in [*whole, (WhisperEncoder, "")] if config.model_type == "whisper" else whole:
        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        network, found = kind.from_pretrained(model, **options, **where)
        missing = [name for name in found["missing_keys"] if name.startswith(part) and "pooler." not in name]
        if not missing:
            return network.get_submodule(part.rstrip("."))
    raise ConfigError(f"hf:{model}: {len(missing)} tensors are missing, such as {min(missing)}. Fetch it again.")


def _normalisation(model: str, where: dict[str, Any]) -> dict[str, Any]:
    """Return what the model's own preprocessing says of mean and deviation; nothing if it says nothing."""
    from transformers.utils import cached_file

    path = cached_file(model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **_local(where))
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def _local(where: dict[str, Any]) -> dict[str, Any]:
    return {"local_files_only": where["local_files_only"]}
