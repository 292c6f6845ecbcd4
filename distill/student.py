"""The student: small trained backbones and a small fusion block, end to end."""

from collections.abc import Mapping
from typing import Any

import torch

from ..data.config import DataConfig
from ..data.runs import RunFolder
from ..extract.config import BackboneConfig
from .config import StudentConfig
from .model import ClipModel, build_backbones, build_model


def student_backbones(data: DataConfig, config: StudentConfig) -> dict[str, BackboneConfig]:
    """Return which backbone the student has for each of its modalities."""
    return {modality: getattr(config, modality) for modality in config.modalities or data.modalities}


def build_student(
    data: DataConfig, config: StudentConfig, n_classes: Mapping[str, int], *, pretrained: bool = True
) -> ClipModel:
    """Build the student of a config; `pretrained=False` leaves out weights that a checkpoint will replace."""
    backbones = build_backbones(data, student_backbones(data, config), config.seed, pretrained=pretrained)
    return build_model(backbones, config.theta, n_classes, config)


def load_student(run: RunFolder, device: torch.device) -> tuple[ClipModel, DataConfig, dict[str, Any]]:
    """Return the best student of a finished run in evaluation mode, its data settings and its config.json."""
    described = run.config
    data = DataConfig.model_validate(described["data"])
    config = StudentConfig.model_validate(described["settings"])
    n_classes = {head: len(names) for head, names in described["classes"].items()}
    student = build_student(data, config, n_classes, pretrained=False)
    student.load_state_dict(run.load_checkpoint("best"))
    return student.to(device).eval(), data, described
