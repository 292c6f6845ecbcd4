"""Log-mel spectrograms as tokens: AST, and the audio front end of Video Swin."""

from functools import partial
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.errors import ConfigError
from .backbone import Backbone


def standardise(log_mel: Tensor) -> Tensor:
    """Bring log10 of mel power, about -10 (silence) to 3, to about -1.5 to 1.75.

    Constants, not statistics of a data set: one cache serves every split, and a clip does not depend on its neighbours.
    """
    return (log_mel + 4.0) / 4.0


def spectrogram_images(log_mel: Tensor, side: int) -> Tensor:
    """Turn log-mel [B, T, mels, steps] into the images [B, 3, T, side, side] of a network that is used to video."""
    images = F.interpolate(standardise(log_mel), size=(side, side), mode="bilinear", align_corners=False)
    return images[:, None].expand(-1, 3, -1, -1, -1)


class OverlappingPatches(nn.Module):
    """Patches of a spectrogram that overlap, all T segments at once as channels; timm's `embed_layer`."""

    def __init__(
        self, stride: int, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, **_: Any
    ) -> None:
        super().__init__()
        mels, steps = ((side - patch_size) // stride + 1 for side in img_size)
        self.num_patches = mels * steps
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Embed [B, T, mels, steps] as [B, patches, D], the steps of one mel band after each other."""
        return self.proj(x).flatten(2).transpose(1, 2)


class SpectrogramTransformer(Backbone):
    """AST: a distilled vision transformer on overlapping patches of a spectrogram.

    Tokens: one for the clip, which is the mean of the class and the distillation token, then one for each patch.
    Source: AST, Interspeech 2021; DeiT, ICML 2021.
    """

    clip_token = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        width: int,
        depth: int,
        n_heads: int,
        patches: tuple[int, int],
        position_std: float = 0.02,
    ) -> None:
        """patches: their side and their stride.  position_std: spread of the first positions, DeiT's if not told."""
        patch, stride = patches
        segments, mels, steps = input_shape
        if min(mels, steps) < patch:
            raise ConfigError(
                f"A spectrogram of {mels} mels x {steps} steps is smaller than a patch of this backbone, "
                f"{patch} x {patch}. Raise audio_mels and audio_steps, or choose ast_micro."
            )
        vit = VisionTransformerDistilled(
            img_size=(mels, steps),
            patch_size=patch,
            in_chans=segments,
            num_classes=0,
            embed_dim=width,
            depth=depth,
            num_heads=n_heads,
            embed_layer=partial(OverlappingPatches, stride),
        )
        super().__init__(input_shape, 1 + vit.patch_embed.num_patches, width)
        self.vit = vit
        assert vit.pos_embed is not None  # which the distilled ones have
        nn.init.trunc_normal_(vit.pos_embed, std=position_std)

    def tokens(self, x: Tensor) -> Tensor:
        """Turn log-mel [B, T, mels, steps] into tokens [B, 1 + patches, D]."""
        x = self.vit.forward_features(standardise(x).to(self.vit.dist_token.dtype))
        return torch.cat([x[:, :2].mean(1, keepdim=True), x[:, 2:]], dim=1) if self.clip_token else x[:, 2:]
