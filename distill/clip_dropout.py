"""Dropout within trained backbones, by clip: the same on one rank or several, in parts of a batch, and once more."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..fuse.seeds import BACKBONES, kept, layer_seeds, levels

WHOLE = ("StochasticDepth", "DropPath")  # as torchvision's and timm's end, whose branch goes or stays as one


class ClipDropout(nn.Module):
    """Stands where a backbone had dropout of values, or (`whole`) of a whole branch of a residual layer.

    seeds: one a clip, of the batch that is under way; None draws from torch's own generator.  layer: tells this place
    from all others of the model.
    """

    def __init__(self, p: float, layer: int, whole: bool) -> None:
        super().__init__()
        self.p, self.layer, self.whole = p, layer, whole
        self.seeds: list[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of x [R, ...], the R rows of the batch's clips one after the other, as many of each."""
        if not (self.training and self.p):
            return x
        return torch.zeros_like(x) if self.p == 1 else self._dropped(x)

    @torch.compiler.disable  # it would compile anew for every seed
    def _dropped(self, x: Tensor) -> Tensor:
        seeds = self.seeds
        if not seeds or len(x) % len(seeds):  # a backbone with an order of its own
            seeds = torch.randint(2**63 - 1, (len(x),)).tolist()
        n_rows = len(x) // len(seeds)
        shape = (n_rows, *(1 if self.whole else size for size in x.shape[1:]))
        keep = kept(levels(seeds, shape, x.device), self.p, x.dtype).flatten(0, 1)  # [R, ...]
        return x * keep.div_(1 - self.p)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"p={self.p}, whole={self.whole}"


def drop_by_clip(backbones: nn.Module) -> None:
    """Put `ClipDropout` in place of every dropout and stochastic depth below a module; parameters stay as they are."""
    n_found = 0
    for parent in list(backbones.modules()):
        for name, child in parent.named_children():
            whole = type(child).__name__.endswith(WHOLE)
            p = getattr(child, "drop_prob", None) or getattr(child, "p", None)
            if p and (whole or type(child) is nn.Dropout):  # where nothing drops, nothing is put between compiled parts
                setattr(parent, name, ClipDropout(p, BACKBONES + n_found, whole))
                n_found += 1


def seed_clips(backbone: nn.Module, seeds: Sequence[int]) -> None:
    """Tell every `ClipDropout` of a backbone whose clips come next."""
    for module in backbone.modules():
        if isinstance(module, ClipDropout):
            module.seeds = layer_seeds(seeds, module.layer)
