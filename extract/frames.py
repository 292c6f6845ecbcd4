"""Any image transformer of timm as a backbone: every frame, or every segment's spectrogram, goes through it alone."""

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ..data.errors import ConfigError, nearest, one_line
from .backbone import Backbone
from .spectrogram import spectrogram_images
from .video_swin import FLOW_MEAN, FLOW_STD

if TYPE_CHECKING:

    class ImageNetwork(nn.Module):
        """What networks of timm have, as far as they are told apart here."""

        pretrained_cfg: Mapping[str, Any]
        num_features: int
        patch_embed: Any

        def forward_features(self, x: Tensor) -> Any:
            """Return what is before the head."""


PREFIX = "network."


class FrameTransformer(Backbone):
    """An image transformer over the T frames of a clip, tokens [B, T * n, D], frame after frame.

    Class and register tokens are left out: Theta-Average would mix them with their neighbours.  Flow is normalised as
    for Video Swin, video and spectrograms with the mean and deviation that the model was trained with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: "ImageNetwork", modality: str, input_shape: tuple[int, ...], side: int) -> None:
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
        return tokens.reshape(x.shape[0], -1, tokens.shape[-1])

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return timm's tensors under the names of this module, the grid of positions resampled to its size.

        Bicubic without antialiasing: with it, DINOv2's tokens at 224 pixels are another thing (cosine 0.996).
        """
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "head_dist.", "fc."))}
        position, own = state.get("pos_embed"), self.network.state_dict().get("pos_embed")
        if position is not None and own is not None and position.ndim == own.ndim == 3 and position.shape != own.shape:
            grid = list(self.network.patch_embed.grid_size)
            n_before = own.shape[1] - prod(grid)  # whose special tokens have positions, and whose have none
            state["pos_embed"] = resample_abs_pos_embed(
                position.float(), grid, num_prefix_tokens=n_before, antialias=False
            )
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
        made = timm.create_model(model, pretrained=False, num_classes=0, **_size_option(model, sized))
        network = cast("ImageNetwork", made)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _not_for(model, sized, error) from None
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[0]
    if sized % patch:
        fitting = [patch * (sized // patch), patch * (sized // patch + 1)]
        raise ConfigError(f"timm:{model}: patches of {patch} pixels do not divide {sized}. Set size to {fitting}.")
    try:
        return FrameTransformer(network, modality, input_shape, sized)
    except (AssertionError, RuntimeError) as error:
        raise _not_for(model, sized, error) from None


def _not_for(model: str, side: int, error: Exception) -> ConfigError:
    return ConfigError(f"timm:{model}: not for pictures of {side} pixels: {one_line(error)}. Change size.")


def pretrained_frames(model: str) -> Mapping[str, Tensor]:
    """Fetch timm's own weights of a model, or take them from its cache; raises ConfigError if that fails."""
    try:
        return timm.create_model(model, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:  # no network; a model without weights
        raise ConfigError(
            f"timm:{model}: its weights cannot be fetched: {one_line(error)}. "
            "Fetch them elsewhere and set weights to the file."
        ) from None


def _size_option(model: str, side: int) -> dict[str, Any]:
    """Return the option that fixes the size of the pictures, for models that have one."""
    with torch.device("meta"):
        network = timm.create_model(model, pretrained=False, num_classes=0)
    return {"img_size": side} if hasattr(getattr(network, "patch_embed", None), "img_size") else {}


def _dry_run(network: "ImageNetwork", side: int) -> Tensor:
    """Return what one picture gives, without computing it; raises ConfigError if these are no tokens."""
    device = next(network.parameters()).device
    with torch.no_grad():
        return _sequence(network, network.eval().forward_features(torch.zeros(1, 3, side, side, device=device)))


def _sequence(network: "ImageNetwork", features: Any) -> Tensor:
    """Return patch tokens [B, n, D] of what a network of timm gives."""
    name, width = type(network).__name__, network.num_features
    if not isinstance(features, Tensor):
        raise ConfigError(f"{name} of timm gives several things, no tokens [B, n, D]. Choose another transformer.")
    if features.ndim == 3 and features.shape[-1] == width:
        n_special = getattr(network, "num_prefix_tokens", int(getattr(network, "cls_token", None) is not None))
        if features.shape[1] > n_special:
            return features[:, n_special:]
    if features.ndim == 4 and features.shape[-1] == width:  # Swin's [B, H, W, D]
        return features.flatten(1, 2)
    if features.ndim == 4 and features.shape[1] == width and _attends(network):  # [B, D, H, W]
        return features.flatten(2).transpose(1, 2)
    raise ConfigError(f"{name} of timm gives {list(features.shape)}, no tokens [B, n, D]. Choose a transformer.")


def _attends(network: nn.Module) -> bool:
    """Say whether there is attention in a network: one without is no transformer."""
    return any("attention" in type(module).__name__.lower() for module in network.modules())
