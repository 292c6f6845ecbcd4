"""Raw clips to logits: a backbone a modality, Theta-Average and what fuses the tokens, as one module."""

from collections.abc import ItemsView, Mapping, Sequence, ValuesView
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..data.config import DataConfig
from ..data.theta import theta_average
from ..extract.backbones import Backbone, build_backbone
from ..extract.config import BackboneConfig
from ..fuse.config import TrainingConfig
from ..fuse.model import FusionModel, FusionOutput, build_fusion
from .clip_dropout import drop_by_clip, seed_clips

if TYPE_CHECKING:

    class BackboneDict(nn.ModuleDict):
        """What a ModuleDict of backbones is: torch's types know it as one of modules."""

        def __getitem__(self, key: str) -> Backbone: ...
        def items(self) -> ItemsView[str, Backbone]: ...
        def values(self) -> ValuesView[Backbone]: ...


class ClipModel(nn.Module):
    """Raw clips in, logits by head out, for whatever modalities are present: the student, or a live teacher."""

    def __init__(self, backbones: Mapping[str, Backbone], fusion: FusionModel, theta: int | None) -> None:
        super().__init__()
        self.backbones = cast("BackboneDict", nn.ModuleDict(dict(backbones)))
        self.fusion, self.theta = fusion, theta
        drop_by_clip(self.backbones)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The order of the columns of `present`."""
        return self.fusion.modalities

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile every backbone, and the parts of the fusion model, in place."""
        for backbone in self.backbones.values():
            backbone.compile(*args, **options)
        self.fusion.compile(*args, **options)

    def tokens(
        self, inputs: Mapping[str, Tensor], present: Tensor, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Run each backbone on the clips that have its modality, and only on those.

        inputs: modality -> [n, ...] raw arrays of the n clips for which `present` is True, in their order.
        present: [B, M] bool.  seeds: one a clip, for dropout in training: what is dropped of a clip depends on nobody
        beside it; None draws them.  Returns modality -> [B, k, D], the rows of missing clips holding zeros that the
        fusion block never looks at; a modality that no clip has is left out.
        """
        if self.training and seeds is None:
            seeds = torch.randint(2**63 - 1, (len(present),)).tolist()
        out = {}
        for column, modality in enumerate(self.modalities):
            if modality not in inputs or not len(inputs[modality]):
                continue
            (rows,) = present[:, column].nonzero(as_tuple=True)
            if self.training and seeds is not None:
                seed_clips(self.backbones[modality], [seeds[at] for at in rows.tolist()])
            found = self.backbones[modality](inputs[modality])
            if self.theta:
                found = theta_average(found, self.theta)
            # A scatter, not a gather: gradients reach the backbone from the rows it computed and no others.
            out[modality] = found.new_zeros(len(present), *found.shape[1:]).index_put((rows,), found)
        return out

    def forward(
        self, inputs: Mapping[str, Tensor], present: Tensor, seeds: Sequence[int] | None = None
    ) -> FusionOutput:
        """Return logits by head [B, N_h] and averaged tokens by modality [B, E]; see `tokens` for the arguments."""
        return self.fusion(self.tokens(inputs, present, seeds), present, seeds)


def build_backbones(
    data: DataConfig, chosen: Mapping[str, BackboneConfig], seed: int, *, pretrained: bool = True
) -> dict[str, Backbone]:
    """Build the backbone that is chosen for each modality.

    pretrained=False leaves out weights: a checkpoint will replace them, or they do not matter.
    """
    built = {}
    for at, (modality, one) in enumerate(chosen.items()):
        weights, shape = one.weights if pretrained else "none", data.input_shape(modality)
        built[modality] = build_backbone(one.name, modality, shape, weights, seed + at, one.clip_token)
    return built


def build_model(
    backbones: Mapping[str, Backbone], theta: int | None, n_classes: Mapping[str, int], config: TrainingConfig
) -> ClipModel:
    """Put a fusion model behind some backbones; config: a teacher's or a student's."""
    fusion = build_fusion(
        {m: backbone.width for m, backbone in backbones.items()},
        {m: min(backbone.n_tokens, theta or backbone.n_tokens) for m, backbone in backbones.items()},
        n_classes,
        config,
    )
    return ClipModel(backbones, fusion, theta)
