"""The student: one small trained backbone a modality, Theta-Average, fusion block and heads, end to end."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data.config import DataConfig
from ..data.runs import RunFolder
from ..data.theta import theta_average
from ..extract.backbones import Backbone, build_backbone
from ..fuse.model import FusionModel, FusionOutput, build_fusion
from .config import StudentConfig


class Student(nn.Module):
    """Raw clips in, logits by head out, for whatever modalities are present."""

    def __init__(self, backbones: Mapping[str, Backbone], fusion: FusionModel, theta: int | None) -> None:
        super().__init__()
        self.backbones, self.fusion, self.theta = nn.ModuleDict(dict(backbones)), fusion, theta

    @property
    def modalities(self) -> tuple[str, ...]:
        """The order of the columns of `present`."""
        return self.fusion.modalities

    def tokens(self, inputs: Mapping[str, Tensor], present: Tensor) -> dict[str, Tensor]:
        """Run each backbone on the clips that have its modality, and only on those.

        inputs: modality -> [n, ...] raw arrays of the n clips for which `present` is True, in their order.
        present: [B, M] bool.  Returns modality -> [B, k, D], the rows of missing clips holding zeros that the
        fusion block never looks at; a modality that no clip has is left out.
        """
        out = {}
        for column, modality in enumerate(self.modalities):
            has = present[:, column]
            if modality not in inputs or not len(inputs[modality]):
                continue
            found = self.backbones[modality](inputs[modality])
            if self.theta:
                found = theta_average(found, self.theta)
            # A scatter, not a gather: gradients reach the backbone from the rows it computed and no others.
            out[modality] = found.new_zeros(len(present), *found.shape[1:]).index_put((has.nonzero()[:, 0],), found)
        return out

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor) -> FusionOutput:
        """Return logits by head [B, N_h] and averaged tokens by modality [B, E]; see `tokens` for the arguments."""
        return self.fusion(self.tokens(inputs, present), present)


def build_student(
    data: DataConfig, config: StudentConfig, n_classes: Mapping[str, int], *, pretrained: bool = True
) -> Student:
    """Build the student of a config; `pretrained=False` leaves out weights that a checkpoint will replace.

    A student of one modality has no learned tokens, as the published one (Tab. 2: 29.64 M parameters).
    """
    modalities = config.modalities or data.modalities
    backbones = {}
    for modality in modalities:
        chosen = getattr(config, modality)
        weights = chosen.weights if pretrained else "none"
        seed = config.seed + modalities.index(modality)
        backbones[modality] = build_backbone(
            chosen.name, modality, data.input_shape(modality), weights, seed, chosen.clip_token
        )
    fusion = build_fusion(
        {m: backbone.width for m, backbone in backbones.items()},
        {m: min(backbone.n_tokens, config.theta or backbone.n_tokens) for m, backbone in backbones.items()},
        n_classes,
        config,
        missing="ignore" if len(modalities) == 1 else config.missing,
    )
    return Student(backbones, fusion, config.theta)


def load_student(run: RunFolder, device: torch.device) -> tuple[Student, DataConfig, dict[str, Any]]:
    """Return the best student of a finished run in evaluation mode, its data settings and its config.json."""
    described = run.config
    data = DataConfig.model_validate(described["data"])
    config = StudentConfig.model_validate(described["settings"])
    n_classes = {head: len(names) for head, names in described["classes"].items()}
    student = build_student(data, config, n_classes, pretrained=False)
    student.load_state_dict(run.load_checkpoint("best"))
    return student.to(device).eval(), data, described
