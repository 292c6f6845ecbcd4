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

CLASSIFIER = "fusion.mlp.classify.to_{}.weight"  # [N_h, 2 E]
NO_WEIGHTS = Path("not-named")  # of RAFT, where nobody reads clips


def student_backbones(data: DataConfig, config: StudentConfig) -> dict[str, BackboneConfig]:
    """Return which backbone the student has for each of its modalities."""
    return {modality: getattr(config, modality) for modality in config.modalities_of(data)}


def build_student(
    data: DataConfig, config: StudentConfig, n_classes: Mapping[str, int], *, pretrained: bool = True
) -> ClipModel:
    """Build the student of a config; `pretrained=False` leaves out weights that a checkpoint will replace."""
    backbones = build_backbones(data, student_backbones(data, config), config.seed, pretrained=pretrained)
    return build_model(backbones, config.theta, n_classes, config)


def run_data(described: Mapping[str, Any], flow_weights: Path | None = None) -> DataConfig:
    """Return the data settings in a run's config.json; flow_weights: RAFT's, which it does not name."""
    found = dict(described["data"])
    if str(found.get("flow_method")).startswith("raft"):
        found["flow_weights"] = flow_weights or NO_WEIGHTS
    return DataConfig.model_validate(found)


def student_settings(
    described: Mapping[str, Any], where: Any, flow_weights: Path | None = None
) -> tuple[DataConfig, StudentConfig]:
    """Return the settings in a student's config.json.

    where: names it in errors.  flow_weights: RAFT's, which a run does not name; without them no clip can be read.
    Raises RunError if it is a teacher's, or none of this version.
    """
    described = described if isinstance(described, Mapping) else {}
    kind, classes = described.get("kind"), described.get("classes")
    if kind == "teacher":
        raise RunError(
            f"{where}: a teacher's run, expected a student's: a teacher starts from cached tokens, only a student from "
            "raw clips. Name a student's run, or train one with karmma distill."
        )
    try:
        if kind != "student":
            raise KeyError("kind")
        if not isinstance(classes, Mapping) or not all(isinstance(names, list) for names in classes.values()):
            raise KeyError("classes")
        return run_data(described, flow_weights), StudentConfig.model_validate(described["settings"])
    except (KeyError, TypeError, ValidationError) as error:
        raise RunError(
            f"{where}: config.json is not that of a student of this version: {one_line(error)}. Train it again."
        ) from None


def filled_student(described: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Any) -> ClipModel:
    """Return the student of a config.json with its tensors, in evaluation mode, on the CPU.

    where: names both in errors.  Raises RunError if the two do not belong together, above all if they are of other
    heads or classes, and as `student_settings`.
    """
    data, config = student_settings(described, where)
    n_classes = {head: len(names) for head, names in described["classes"].items()}
    prefix, suffix = CLASSIFIER.split("{}")
    found = {
        name.removeprefix(prefix).removesuffix(suffix): len(tensor)
        for name, tensor in tensors.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }
    if found != n_classes:
        raise RunError(
            f"{where}: other labels: its weights are for {_counts(found)}, its config.json names {_counts(n_classes)}. "
            "Put files of one run together."
        )
    student = build_student(data, config, n_classes, pretrained=False)
    own = student.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [name for name in sorted(own.keys() & tensors.keys()) if own[name].shape != tensors[name].shape]
    if wrong:
        raise RunError(
            f"{where}: {len(wrong)} of its tensors are not those that its config.json describes, such as {wrong[0]}. "
            "Put files of one run together."
        )
    student.load_state_dict(tensors)
    return student.eval()


def _counts(n_classes: Mapping[str, int]) -> str:
    return ", ".join(f"{head} {n}" for head, n in n_classes.items()) or "no heads"


def load_student(
    run: RunFolder, device: torch.device, flow_weights: Path | None = None
) -> tuple[ClipModel, DataConfig, dict[str, Any]]:
    """Return the best student of a finished run in evaluation mode, its data settings and its config.json.

    flow_weights: the weights file of RAFT, if flow is computed with it: a run does not say where that is.
    Raises RunError if the run is no student's, its checkpoint is missing or damaged, or not that of its config.json,
    ConfigError if RAFT lacks its weights.
    """
    described = run.config
    data, config = student_settings(described, run.path, flow_weights)
    if data.flow_weights == NO_WEIGHTS and "flow" in student_backbones(data, config):
        said = f"its flow is computed with {data.flow_method}. Name its weights by flow_weights."
        raise ConfigError(f"{run.path}: {said}")
    student = filled_student(described, run.load_checkpoint("best"), run.path)
    return student.to(device), data, described
