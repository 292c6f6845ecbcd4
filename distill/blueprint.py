"""All that decides what a model costs, of a model that was trained or is only configured."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..data.config import DataConfig
from ..data.errors import ConfigError, RunError, one_line
from ..data.modality import in_order
from ..data.runs import RunFolder
from ..extract.backbone import Backbone
from ..extract.config import BackboneConfig, ExtractConfig
from ..extract.weights import shown_name
from ..fuse.config import TeacherConfig
from .config import StudentConfig
from .model import ClipModel, build_backbones, build_model
from .student import run_data, student_backbones

EPIC = {"verb": 97, "noun": 300}  # classes of EPIC-KITCHENS-100, the heads of the published figures


@dataclass(frozen=True)
class Blueprint:
    """All that decides what a model costs.

    is_frozen: whether the backbones are, as a teacher's: then only what follows them is trained.
    imported: modality -> [k, D] of tokens that were made elsewhere: what made them is not known, and not counted.
    """

    name: str
    data: DataConfig
    backbones: Mapping[str, BackboneConfig]
    theta: int | None
    config: TeacherConfig | StudentConfig
    n_classes: Mapping[str, int]
    is_frozen: bool
    imported: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities of the model, in order."""
        return in_order({**self.backbones, **self.imported})

    def build(self) -> ClipModel:
        """Build the model with random weights: they do not matter here."""
        built = build_backbones(self.data, self.backbones, self.config.seed, pretrained=False)
        built |= {modality: ImportedTokens(shape) for modality, shape in self.imported.items()}
        return build_model({m: built[m] for m in self.modalities}, self.theta, self.n_classes, self.config)


class ImportedTokens(Backbone):
    """Stands where a backbone would, if the tokens were not made elsewhere."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape, *shape)

    def tokens(self, x: Tensor) -> Tensor:
        """Return the tokens as they are."""
        return x


def blank_clip(backbone: Backbone) -> Tensor:
    """Return one clip for a backbone, [1, ...], of zeros; on the default device."""
    return torch.zeros(1, *backbone.input_shape)


def teacher_blueprint(
    data: DataConfig, extract: ExtractConfig, config: TeacherConfig, n_classes: Mapping[str, int]
) -> Blueprint:
    """Return the teacher that some settings describe; raises ConfigError if all its modalities are imported."""
    backbones = {modality: getattr(extract, modality) for modality in data.require_read()}
    return Blueprint("teacher", data, backbones, config.theta or extract.theta, config, n_classes, is_frozen=True)


def student_blueprint(data: DataConfig, config: StudentConfig, n_classes: Mapping[str, int]) -> Blueprint:
    """Return the student that some settings describe."""
    backbones = student_backbones(data, config)
    return Blueprint("student", data, backbones, config.theta, config, n_classes, is_frozen=False)


def run_blueprint(run: RunFolder, extract: ExtractConfig) -> Blueprint:
    """Return what a finished run trained.

    extract: names the backbones behind a teacher's tokens; its run knows which they were.  Raises ConfigError if
    they are others, RunError if the run is not one of ours, or older than these records.
    """
    described = run.config
    try:
        data = run_data(described)
        n_classes = {head: len(names) for head, names in described["classes"].items()}
        if described["kind"] == "student":
            found = student_blueprint(data, StudentConfig.model_validate(described["settings"]), n_classes)
        else:
            config = TeacherConfig.model_validate(described["settings"])
            found = _taught(run, described["made_by"], extract, Blueprint("", data, {}, None, config, n_classes, True))
    except (KeyError, ValidationError) as error:
        raise RunError(
            f"{run.path}: config.json is not that of a teacher or student of this version: {one_line(error)}. "
            "Train the run again."
        ) from None
    return replace(found, name=run.path.name)


def _taught(run: RunFolder, made_by: dict[str, dict[str, Any]], extract: ExtractConfig, bare: Blueprint) -> Blueprint:
    """Return a teacher's blueprint with the backbones that made its tokens."""
    imported = {m: tuple(made["shape"]) for m, made in made_by.items() if made["name"] == "imported"}
    made_here = {m: made for m, made in made_by.items() if m not in imported}
    thetas = {m: made["theta"] for m, made in made_here.items()}
    if len({*thetas.values()}) > 1:
        said = ", ".join(f"{modality} {theta or 'none'}" for modality, theta in thetas.items())
        raise RunError(f"{run.path}: tokens of several Theta cannot be counted together ({said}). Report another run.")
    backbones = {}
    for modality, made in made_here.items():
        chosen = getattr(extract, modality)
        if shown_name(chosen.name) != made["name"]:
            raise ConfigError(
                f"{run.path}: its {modality} tokens are of {made['name']}, extract.{modality} names "
                f"{shown_name(chosen.name)}. Report under the settings that the cache was made with."
            )
        backbones[modality] = chosen.model_copy(update={"clip_token": made.get("clip_token")})
    theta = bare.config.theta or next(iter(thetas.values()), None)
    return replace(bare, backbones=backbones, theta=theta, imported=imported)
