"""Any image transformer of timm as a backbone: every frame, or every segment's spectrogram, goes through it alone."""

from collections.abc import Mapping

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ..data.errors import ConfigError, nearest
from .backbone import Backbone
from .spectrogram import spectrogram_images
from .video_swin import FLOW_MEAN, FLOW_STD

PREFIX = "network."


class FrameTransformer(Backbone):
    """An image transformer over the T frames of a clip, tokens [B, T * n, D], frame after frame.

    Class and register tokens are left out: Theta-Average would mix them with their neighbours.  Flow is normalised as
    for Video Swin, video and spectrograms with the mean and deviation that the model was trained with.
    """

    def __init__(self, network: nn.Module, modality: str, input_shape: tuple[int, ...], side: int) -> None:
        mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
        found = _dry_run(network, side)
        super().__init__(input_shape, input_shape[0] * found.shape[1], found.shape[2])
        self.network, self.side, self.is_sound = network, side, modality == "audio"
        if modality == "flow":
            mean, std = FLOW_MEAN, FLOW_STD
        # Spectrograms come as they are: already about -1.5 to 1.75, and no picture.
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def tokens(self, x: Tensor) -> Tensor:
        """Turn a raw batch, pixels 0..255 [B, T, 3, H, W] or log-mel [B, T, mels, steps], into tokens [B, K, D]."""
        x = x.to(self.mean.dtype)
        if self.is_sound:
            images = spectrogram_images(x, self.side).transpose(1, 2)  # [B, T, 3, side, side]
        else:
            images = (x / 255 - self.mean) / self.std
        tokens = _sequence(self.network, self.network.forward_features(images.flatten(0, 1)))  # [B * T, n, D]
        return tokens.reshape(len(x), -1, tokens.shape[-1])

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return timm's tensors under the names of this module, the grid of positions resampled to its size.

        Bicubic without antialiasing: with it, DINOv2's tokens at 224 pixels are another thing (cosine 0.996).
        """
        own = self.network.state_dict()
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "fc."))}
        position = state.get("pos_embed")
        if position is not None and position.shape[1] != own["pos_embed"].shape[1]:
            grid = list(self.network.patch_embed.grid_size)
            n_prefix = self.network.num_prefix_tokens
            resampled = resample_abs_pos_embed(position.float(), grid, num_prefix_tokens=n_prefix, antialias=False)
            state["pos_embed"] = resampled
        return {PREFIX + name: tensor for name, tensor in state.items()}


def build_frames(model: str, modality: str, input_shape: tuple[int, ...]) -> FrameTransformer:
    """Build `timm:<model>` with random weights for clips of one shape.

    Raises ConfigError if timm has no such model, if it gives no tokens, or if its patches do not divide the pictures.
    """
    if not timm.is_model(model.partition(".")[0]):
        raise ConfigError(f"timm has no model {model!r}. {nearest(model.partition('.')[0], timm.list_models())}")
    sized = input_shape[-1]
    if modality == "audio":  # a square that holds the spectrogram, in whole patches
        sized = -(-max(input_shape[1:]) // 32) * 32
    try:
        network = timm.create_model(model, pretrained=False, num_classes=0, **_size_option(model, sized))
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"timm:{model}: not for pictures of {sized} pixels: {error}. Change size.") from None
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1, 1))[0]
    if sized % patch:
        fitting = [patch * (sized // patch), patch * (sized // patch + 1)]
        raise ConfigError(f"timm:{model}: patches of {patch} pixels do not divide {sized}. Set size to {fitting}.")
    return FrameTransformer(network, modality, input_shape, sized)


def pretrained_frames(model: str) -> Mapping[str, Tensor]:
    """Fetch timm's own weights of a model, or take them from its cache; raises ConfigError if that fails."""
    try:
        return timm.create_model(model, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:  # no network; a model without weights
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"timm:{model}: its weights cannot be fetched: {reason}. Fetch them elsewhere and set weights to the file."
        ) from None


def _size_option(model: str, side: int) -> dict[str, int]:
    """Return the option that fixes the size of the pictures, for models that have one."""
    with torch.device("meta"):
        network = timm.create_model(model, pretrained=False, num_classes=0)
    return {"img_size": side} if hasattr(getattr(network, "patch_embed", None), "img_size") else {}


def _dry_run(network: nn.Module, side: int) -> Tensor:
    """Return what one picture gives, without computing it; raises ConfigError if these are no tokens."""
    device = next(network.parameters()).device
    with torch.no_grad():
        return _sequence(network, network.eval().forward_features(torch.zeros(1, 3, side, side, device=device)))


def _sequence(network: nn.Module, features: Tensor) -> Tensor:
    """Return patch tokens [B, n, D] of what a network of timm gives."""
    if features.ndim == 3 and features.shape[-1] == network.num_features:
        return features[:, getattr(network, "num_prefix_tokens", 0) :]
    if features.ndim == 4 and features.shape[-1] == network.num_features:  # Swin's [B, H, W, D]
        return features.flatten(1, 2)
    name = type(network).__name__
    raise ConfigError(f"{name} of timm gives {list(features.shape)}, no tokens [B, n, D]. Choose a transformer.")
