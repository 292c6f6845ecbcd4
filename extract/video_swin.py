"""Video Swin as tokens: torchvision's modules and weights, with window attention that is planned and fused."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d

from .attention import BiasedAttention
from .backbone import Backbone
from .checkpoints import torchvision_names
from .spectrogram import spectrogram_images

Size = tuple[int, int, int]  # time, height, width

# What pixels are in the eyes of the Kinetics-400 weights. Source: transforms of torchvision's Swin3D_*_Weights.
VIDEO_MEAN, VIDEO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# No motion (u = v = 128, magnitude 0) becomes 0 in all channels; the unit is video's, so that its weights fit.
FLOW_MEAN, FLOW_STD = (128 / 255, 128 / 255, 0.0), (0.225, 0.225, 0.225)


def _size(along: Iterable[int]) -> Size:
    t, h, w = along
    return t, h, w


class WindowPlan(nn.Module):
    """Which token goes to which shifted window, and which tokens of a window may not see each other.

    It depends on sizes alone, so the layers of a stage share one. Windows under the same mask lie side by side: there
    are at most 8 kinds, and a mask for each kind takes a fraction of the memory of a mask for each window.
    """

    source: Tensor
    target: Tensor
    mask: Tensor

    def __init__(self, size: Size, window: Size, shift: Size) -> None:
        super().__init__()
        # Along an axis that one window covers there is nothing to shift.
        shift = _size(0 if n <= w else s for n, w, s in zip(size, window, shift, strict=True))
        self.size = size
        self.window = _size(min(n, w) for n, w in zip(size, window, strict=True))
        self.padded = _size(-(-n // w) * w for n, w in zip(size, self.window, strict=True))
        # Computed on the CPU, whatever the default device is: on `meta` nobody could count the windows of a kind.
        places = torch.arange(prod(self.padded), device="cpu").view(self.padded)
        places = self._cut(places.roll([-s for s in shift], (0, 1, 2)))
        kinds, kind = self._cut(self._regions(shift)).unique(dim=0, return_inverse=True)
        source = places[kind.argsort(stable=True)].flatten()
        self.n_windows = kind.bincount().tolist()  # of each kind
        mask = torch.where(kinds[:, None, :] == kinds[:, :, None], 0.0, -100.0)  # -100 as in torchvision
        device = torch.get_default_device()
        # Not persistent: they follow from the sizes, and the names of the state dict stay torchvision's.
        self.register_buffer("source", source.to(device), persistent=False)  # [places]
        self.register_buffer("target", source.argsort().to(device), persistent=False)  # [places]
        self.register_buffer("mask", mask.to(device), persistent=False)  # [kinds, n, n]

    def _cut(self, volume: Tensor) -> Tensor:
        """Cut [T, H, W] into windows [n_windows, n]."""
        (t, h, w), (a, b, c) = self.padded, self.window
        cut = volume.view(t // a, a, h // b, b, w // c, c)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, a * b * c)

    def _regions(self, shift: Size) -> Tensor:
        """Number the parts [T, H, W] of the rolled volume whose places were neighbours before they were rolled."""
        regions = torch.zeros(self.padded, dtype=torch.long, device="cpu")
        for axis, (n, w, s) in enumerate(zip(self.padded, self.window, shift, strict=True)):
            place = torch.arange(n, device="cpu")
            part = (place >= n - w).long() + (place >= n - s) if s else torch.zeros_like(place)
            regions = 3 * regions + part.view([-1 if axis == other else 1 for other in range(3)])
        return regions

    def split(self, x: Tensor) -> Tensor:
        """Cut [B, T, H, W, C] into windows [n_windows * B, n, C], zeros where a window juts out."""
        batch, width, n = x.shape[0], x.shape[-1], prod(self.window)
        if self.padded != self.size:
            ends = [p - n for p, n in zip(self.padded, self.size, strict=True)]
            x = F.pad(x, (0, 0, 0, ends[2], 0, ends[1], 0, ends[0]))
        places = torch.arange(batch, device=x.device)[:, None] * len(self.source) + self.source.view(-1, 1, n)
        # One gather of whole rows stands for roll, cut and sort: 4 to 6 times faster on a CPU.
        return x.reshape(-1, width).index_select(0, places.flatten()).view(-1, n, width)

    def join(self, windows: Tensor, batch: int) -> Tensor:
        """Undo `split`: windows [n_windows * B, n, C] become [B, T, H, W, C]."""
        n, width = windows.shape[1:]
        window, place = self.target // n, self.target % n
        places = (window * batch + torch.arange(batch, device=windows.device)[:, None]) * n + place  # [B, places]
        x = windows.reshape(-1, width).index_select(0, places.flatten()).view(batch, *self.padded, width)
        t, h, w = self.size
        return x if self.padded == self.size else x[:, :t, :h, :w]


class FusedWindowAttention(ShiftedWindowAttention3d):
    """torchvision's window attention, computed for the one size that `plan` was made for."""

    plan: WindowPlan

    def position_bias(self) -> Tensor:
        """Gather the learned bias [heads, n, n] of each pair of places in a window."""
        n = prod(self.plan.window)
        return self.relative_position_bias_table.t()[:, self.relative_position_index[:n, :n].flatten()].view(-1, n, n)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the windows of [B, T, H, W, C]."""
        batch = x.shape[0]
        # [n_windows * B, n, 3C] -> three of [n_windows * B, heads, n, C / heads]
        qkv = self.qkv(self.plan.split(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.position_bias()
        kinds = [count * batch for count in self.plan.n_windows]
        parts = zip(*(tensor.split(kinds) for tensor in qkv), self.plan.mask, strict=True)
        # The fused kernel's output has its heads side by side in memory: flattened here, it is copied at most once.
        out = [self._attend(q, k, v, bias + mask).transpose(1, 2).flatten(2) for q, k, v, mask in parts]
        joined = self.proj(out[0] if len(out) == 1 else torch.cat(out))
        return self.plan.join(F.dropout(joined, self.dropout, self.training), batch)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """softmax(q k' / sqrt(d) + bias) v for q, k, v [windows, heads, n, d] and one bias [heads, n, n]."""
        dropout, bias = self.attention_dropout if self.training else 0.0, bias.to(q.dtype)
        if bias.requires_grad and q.device.type == "cpu" and not dropout:
            return BiasedAttention.apply(q, k, v, bias)
        return F.scaled_dot_product_attention(q, k, v, bias[None], dropout)


def swin_network(
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window: Size = (8, 7, 7),
    mlp_ratio: float = 4.0,
    stochastic_depth: float = 0.1,
    patch: Size = (2, 4, 4),
) -> SwinTransformer3d:
    """Build torchvision's network with fused attention in it; the defaults are those of Swin3D-T, S and B."""

    def block(*args: Any, attn_layer: type[nn.Module], **kwargs: Any) -> SwinTransformerBlock:
        return SwinTransformerBlock(*args, attn_layer=FusedWindowAttention, **kwargs)

    return SwinTransformer3d(
        patch_size=list(patch),
        embed_dim=embed_dim,
        depths=list(depths),
        num_heads=list(num_heads),
        window_size=list(window),
        mlp_ratio=mlp_ratio,
        stochastic_depth_prob=stochastic_depth,
        num_classes=1,  # the head is left behind
        block=block,
    )


def plan_windows(features: nn.Sequential, grid: Size) -> Size:
    """Give each attention layer the plan for its size; return the last grid.

    features: torchvision's stages.  grid: patches along time, height and width before the first stage.
    """
    for stage in features:
        if isinstance(stage, PatchMerging):
            grid = (grid[0], -(-grid[1] // 2), -(-grid[2] // 2))
            continue
        plans: dict[Size, WindowPlan] = {}
        for layer in cast(Iterable[SwinTransformerBlock], stage):
            window, shift = _size(layer.attn.window_size), _size(layer.attn.shift_size)
            if shift not in plans:
                plans[shift] = WindowPlan(grid, window, shift)
            layer.attn.plan = plans[shift]
    return grid


class VideoSwin(Backbone):
    """Video Swin without its classification head, with the final norm; also for flow and, as images, for sound.

    The names in its state dict are torchvision's. A token for the whole clip, if chosen, comes first: the mean of the
    others, which its classification head would see.
    """

    clip_token = False
    mean: Tensor
    std: Tensor

    def __init__(self, network: SwinTransformer3d, modality: str, input_shape: tuple[int, ...]) -> None:
        is_sound, patch = modality == "audio", network.patch_embed.tuple_patch_size
        if is_sound:  # square, and whole patches down to the last stage: 128 x 224 becomes 224 x 224
            multiple = patch[1] * 2 ** sum(isinstance(stage, PatchMerging) for stage in network.features)
            side = -(-max(input_shape[1:]) // multiple) * multiple
            size = (input_shape[0], side, side)
        else:
            size = _size((input_shape[0], *input_shape[2:]))
        grid = plan_windows(network.features, _size(-(-n // p) for n, p in zip(size, patch, strict=True)))
        super().__init__(input_shape, prod(grid), network.num_features)
        self.is_sound, self.size = is_sound, size
        self.patch_embed, self.features, self.norm = network.patch_embed, network.features, network.norm
        mean, std = (FLOW_MEAN, FLOW_STD) if modality == "flow" else (VIDEO_MEAN, VIDEO_STD)
        # Buffers follow the device; not persistent, since they are ours and not the checkpoint's.
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1, 1), persistent=False)

    def pixels(self, x: Tensor) -> Tensor:
        """Normalise a raw batch, pixels 0..255 [B, T, 3, H, W] or log-mel [B, T, mels, steps], to [B, 3, T, H, W]."""
        x = x.to(self.mean.dtype)
        if self.is_sound:
            return spectrogram_images(x, self.size[1])
        return (x.transpose(1, 2) / 255 - self.mean) / self.std

    def fitted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of torchvision's checkpoints, or of Video Swin's authors', under torchvision's names."""
        # Video Swin's authors keep the places of pairs as a table, torchvision flat; they follow from the window.
        own = {name: value for name, value in self.state_dict().items() if name.endswith("relative_position_index")}
        return {**own, **torchvision_names(state)}

    def tokens(self, x: Tensor) -> Tensor:
        """Turn a raw batch into tokens [B, K, D], row after row of frame after frame."""
        x = self.norm(self.features(self.patch_embed(self.pixels(x)))).flatten(1, 3)
        return torch.cat([x.mean(1, keepdim=True), x], dim=1) if self.clip_token else x
