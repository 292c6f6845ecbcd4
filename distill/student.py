"""The student: small trained backbones and a small fusion block, end to end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..data.config import DataConfig
from ..data.errors import ConfigError, RunError, one_line
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


def load_student(
    run: RunFolder, device: torch.device, flow_weights: Path | None = None
) -> tuple[ClipModel, DataConfig, dict[str, Any]]:
    """Return the best student of a finished run in evaluation mode, its data settings and its config.json.

    flow_weights: the weights file of RAFT, if flow is computed with it: a run does not say where that is.
    Raises RunError if config.json is not that of a student, or the checkpoint does not belong to it, ConfigError if
    RAFT lacks its weights.
    """
    described = run.config
    try:
        found = dict(described["data"])
        method = str(found.get("flow_method"))
        if method.startswith("raft"):
            if flow_weights is None:
                raise ConfigError(f"{run.path}: its flow is computed with {method}. Name its weights by flow_weights.")
            found["flow_weights"] = flow_weights
        data = DataConfig.model_validate(found)
        config = StudentConfig.model_validate(described["settings"])
        n_classes = {head: len(names) for head, names in described["classes"].items()}
    except ConfigError:
        raise
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        said = error.errors()[0] if isinstance(error, ValidationError) else {"msg": f"no {one_line(error)}", "loc": ()}
        where = ".".join(map(str, said["loc"]))
        raise RunError(
            f"{run.path / 'config.json'}: not the settings of a student: {where}{': ' if where else ''}{said['msg']}. "
            "Use the version of karmma that made the run, or train it again."
        ) from None
    student = build_student(data, config, n_classes, pretrained=False)
    weights = run.load_checkpoint("best")
    _require_fit(run.path / "best.safetensors", student.state_dict(), weights)
    student.load_state_dict(weights)
    return student.to(device).eval(), data, described


def _require_fit(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise RunError unless a checkpoint holds tensors of the names and shapes that its run's config.json implies."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (wanted, found)]
    wrong = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    if wrong:
        expected, there = (one.get(wrong[-1], "nothing of that name") for one in shapes)
        raise RunError(
            f"{path}: {len(wrong)} tensors are not those of the run's config.json, such as {wrong[-1]}: expected "
            f"{expected}, found {there}. It belongs to another student, or to other classes: put this run's own "
            "checkpoint back, or train the run again."
        )
