"""What the data sets of the field need: gigabytes of cache, GPU hours, and how fast each GPU has to be fed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from ..data.annotations import ClipTable
from ..data.config import DataConfig
from ..extract.config import ExtractConfig
from ..fuse.config import TeacherConfig
from .blueprint import EPIC, Blueprint, student_blueprint, teacher_blueprint
from .config import StudentConfig
from .efficiency import count

BYTES_TOKEN, BYTES_LOGIT = 2, 4  # float16, float32
BACKWARD = 3  # operations of a training step for one of its forward pass: the backward pass takes two


@dataclass(frozen=True)
class DataSet:
    """A data set by its numbers: clips to train on, and all others; modalities; head -> classes."""

    name: str
    n_train: int
    n_other: int
    modalities: tuple[str, ...]
    n_classes: Mapping[str, int]

    @classmethod
    def of(cls, table: ClipTable, data: DataConfig) -> Self:
        """Return the numbers of a clip table of one's own."""
        n_train, n_classes = len(table.rows("train")), {head: len(table.classes(head)) for head in data.heads}
        return cls(str(table.path), n_train, table.n_clips - n_train, data.read_modalities, n_classes)


# Rows of the official annotation files.  Ego4D has no list of action segments for all of it: its 3,670 hours (Grauman
# et al., 2022) are taken in windows of 8 s without overlap, and the classes are EPIC-KITCHENS'.
DATA_SETS = (
    DataSet("EPIC-KITCHENS-100", 67_217, 9_668, ("video", "flow", "audio"), EPIC),
    DataSet("Something-Something V2", 168_913, 24_777 + 27_157, ("video", "flow", "detections"), {"action": 174}),
    DataSet("Ego4D in windows of 8 s", 3_670 * 3600 // 8, 0, ("video", "flow", "audio"), EPIC),
)


@dataclass(frozen=True)
class Need:
    """What one data set needs under some settings.

    tokens_gb, logits_gb: of the cache, all views.  extract_h, teacher_h, student_h: GPU hours at the sustained rate
    that was asked for; a teacher reads from the cache.  read_gb_s: at which a GPU that trains a teacher never waits.
    """

    name: str
    n_clips: int
    tokens_gb: float
    logits_gb: float
    extract_h: float
    teacher_h: float
    read_gb_s: float
    student_h: float

    def figures(self) -> dict[str, str]:
        """Return what is needed, as text by what it is."""
        return {
            "clips": f"{self.n_clips:,}",
            "tokens in the cache (GB)": f"{self.tokens_gb:,.0f}",
            "logits in the cache (GB)": f"{self.logits_gb:.2f}",
            "extraction (GPU hours)": f"{self.extract_h:,.1f}",
            "training a teacher (GPU hours)": f"{self.teacher_h:,.1f}",
            "read from the cache by each GPU then (GB/s)": f"{self.read_gb_s:.1f}",
            "training a student (GPU hours)": f"{self.student_h:,.0f}",
        }


def side_by_side(needs: Sequence[Need]) -> list[list[str]]:
    """Return the figures of several data sets as rows of a table, the first one its header."""
    figures = [each.figures() for each in needs]
    return [["", *(each.name for each in needs)], *([name, *(each[name] for each in figures)] for name in figures[0])]


def need(
    found: DataSet,
    data: DataConfig,
    extract: ExtractConfig,
    teacher: TeacherConfig,
    student: StudentConfig,
    tflops: float,
) -> Need:
    """Return what a data set needs, with its own modalities and classes, under these settings.

    tflops: operations, in 10^12 a second, that a GPU sustains.  Nothing is built but on the meta device.
    """
    data = data.model_copy(update={"modalities": found.modalities})
    student = student.model_copy(update={"modalities": found.modalities})
    n_clips, n_made = found.n_train + found.n_other, found.n_train * extract.views + found.n_other
    whole = teacher_blueprint(data, extract, teacher, found.n_classes)
    cached = _cached(whole, extract.theta)
    a_clip = BYTES_TOKEN * sum(k * width for k, width in cached.imported.values())
    head = _gflops(cached)
    per_hour = tflops * 1e3 * 3600  # GFLOPs
    seen = BACKWARD * found.n_train
    return Need(
        found.name,
        n_clips,
        a_clip * n_made / 1e9,
        # A place for each view of every clip, used or not.
        BYTES_LOGIT * sum(found.n_classes.values()) * n_clips * extract.views / 1e9,
        (_gflops(whole) - head) * n_made / per_hour,
        head * seen * teacher.epochs / per_hour,
        tflops * 1e3 / (BACKWARD * head) * a_clip / 1e9,
        _gflops(student_blueprint(data, student, found.n_classes)) * seen * student.epochs / per_hour,
    )


def _gflops(blueprint: Blueprint) -> float:
    """Return the operations of one pass over a clip that has all modalities."""
    return count(blueprint, whole_only=True).rows[0].gflops


def _cached(blueprint: Blueprint, theta: int | None) -> Blueprint:
    """Return a teacher whose tokens come from the cache, as many as extraction keeps."""
    with torch.device("meta"):
        backbones = blueprint.build().backbones
    kept = {m: (min(each.n_tokens, theta or each.n_tokens), each.width) for m, each in backbones.items()}
    return replace(blueprint, backbones={}, imported=kept)
