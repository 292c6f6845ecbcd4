"""Train a student on raw clips beside the cached teacher, and evaluate it.

Nothing at import needs torch: a run that is there already is found without it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.annotations import ClipTable
from ..data.cache import Cache
from ..data.config import DataConfig, digest
from ..data.identity import input_identity
from ..data.runs import RunFolder
from ..fuse.stage import require_labels
from .config import StudentConfig
from .results import Evaluation
from .teacher import CachedTeacher, find_teacher, known_present

NOT_DECISIVE = {"device", "threads", "teacher", "readers", "input_cache_mb"}


@dataclass
class StudentReport:
    """Where the student's run is, and what it was trained on."""

    run: Path
    teacher: str
    modalities: tuple[str, ...]
    result: dict[str, Any]
    was_there: bool = False


def distill_student(table: ClipTable, data: DataConfig, config: StudentConfig) -> StudentReport:
    """Train the student end to end and write its run folder.

    The run's name is a digest of all that decides its result, so the same call again finds it and does nothing.
    Raises CacheError if the teacher is missing or ambiguous, StaleCacheError if it saw other inputs or classes,
    IncompleteCacheError if a training clip has no logits.
    """
    cache = Cache.open(data.cache) if config.teacher != "none" or data.cache.exists() else None
    require_labels(table, data.heads)
    teacher = find_teacher(cache, table, data, config)
    described = describe_run(table, data, config, teacher)
    run = RunFolder(data.runs / f"student-{digest(described)[:8]}")
    modalities = config.modalities or data.modalities
    was_there = run.is_finished
    if not was_there:
        from .distillation import Distillation

        present = known_present(cache, table, data, modalities)
        Distillation(table, data, config, teacher, present).train(run, described)
    return StudentReport(run.path, teacher.digest, modalities, run.result, was_there)


def describe_run(table: ClipTable, data: DataConfig, config: StudentConfig, teacher: CachedTeacher) -> dict[str, Any]:
    """Return all that decides a student: settings, inputs, teacher, clips and labels; no paths, no devices."""
    modalities = config.modalities or data.modalities
    return {
        "kind": "student",
        "settings": config.model_dump(mode="json", exclude=NOT_DECISIVE),
        "data": data.model_dump(mode="json", exclude={"table", "cache", "runs"}),
        "inputs": {modality: input_identity(modality, data) for modality in modalities},
        "teacher": teacher.digest,
        "clips": table.content_digest(),
        "classes": {head: list(table.classes(head)) for head in data.heads},
    }


def evaluate_student(run: RunFolder, table: ClipTable, split: str, device: str) -> tuple[Evaluation, list[Path]]:
    """Evaluate a finished run on a split, or read what was found before for the same clips; return it and its files.

    Raises as `evaluate_run`.
    """
    folder = run.path / "evaluation"
    files = [folder / f"{split}.csv", folder / f"{split}.json", run.path / "report.html"]
    made_from = digest([run.config, run.result, table.content_digest()])
    evaluation = Evaluation.read(folder, split, made_from)
    if evaluation is None or not all(file.exists() for file in files):
        from .evaluate import evaluate_run
        from .report import write_report

        evaluation = evaluate_run(run, table, split, device, made_from)
        evaluation.write(folder)
        write_report(run, evaluation)
    return evaluation, files
