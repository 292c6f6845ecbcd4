"""Train a student on raw clips beside the cached teacher, and evaluate it.

Nothing at import needs torch: a run that is there already is found without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.annotations import ClipTable
from ..data.cache import Cache, has_cache
from ..data.config import PLACES, DataConfig, Place, digest
from ..data.identity import input_identity
from ..data.modality import MODALITIES
from ..data.publish import publish
from ..data.runs import RunFolder
from ..extract.weights import weights_content
from ..fuse.config import NOT_DECISIVE as SHARED
from ..fuse.stage import require_labels
from .config import NO_TEACHER, StudentConfig
from .results import FORMAT, Asked, Evaluation
from .teacher import CachedTeacher, find_teacher, known_present

if TYPE_CHECKING:
    from .subsets import Predictions

NOT_DECISIVE = SHARED | {
    *("variant", "teacher", "views"),  # what they come to is said elsewhere
    *("accumulate", "recompute", "readers", "input_cache_mb", "decoded_gb"),
}


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
    plan = plan_student(table, data, config)
    run, was_there = plan.run, plan.run.is_finished
    if not was_there:
        from ..fuse.ranks import joined
        from ..fuse.training import prepare
        from .distillation import Distillation

        known = known_present(plan.cache, table, data, config)
        with (
            joined(prepare(config)) as device,
            Distillation(table, data, config, plan.teacher, known, device) as course,
        ):
            course.train(run, plan.described)
    return StudentReport(run.path, plan.teacher.digest, config.modalities_of(data), run.result, was_there)


@dataclass(frozen=True)
class StudentPlan:
    """A training that could begin: beside which teacher, into which run folder; described: all that decides it."""

    cache: Cache | None
    teacher: CachedTeacher
    described: dict[str, Any]
    run: RunFolder


def plan_student(table: ClipTable, data: DataConfig, config: StudentConfig) -> StudentPlan:
    """Return what `distill_student` would do, and raise what it would raise before it begins; nothing is written."""
    require_labels(table, data.heads)
    cache = Cache.open(data.cache) if config.teacher != NO_TEACHER or has_cache(data.cache) else None
    teacher = find_teacher(cache, table, data, config)
    described = describe_run(table, data, config, teacher)
    return StudentPlan(cache, teacher, described, RunFolder(data.runs / f"student-{digest(described)[:8]}"))


def describe_run(table: ClipTable, data: DataConfig, config: StudentConfig, teacher: CachedTeacher) -> dict[str, Any]:
    """Return all that decides a student: settings, inputs, teacher, clips and labels; no paths, no devices."""
    modalities = config.modalities_of(data)
    unused = set(MODALITIES) - set(modalities)
    settings = config.model_dump(mode="json", exclude={*NOT_DECISIVE, *unused})
    for modality in modalities:
        settings[modality]["weights"] = weights_content(settings[modality]["weights"], f"student.{modality}")
    return {
        "kind": "student",
        "settings": settings,
        "data": data.model_dump(mode="json", exclude={*PLACES}),
        "inputs": {modality: input_identity(modality, data) for modality in modalities},
        "teacher": teacher.digest,
        "views": teacher.n_views,
        "clips": table.content_digest(),
        "classes": {head: list(table.classes(head)) for head in data.heads},
    }


@dataclass
class Evaluated:
    """A run's evaluation, its files, and whether it was there already."""

    evaluation: Evaluation
    files: list[Path]
    was_there: bool


def evaluate(
    run: RunFolder, table: ClipTable, cache: Place, asked: Asked, found: "Predictions | None" = None
) -> Evaluated:
    """Evaluate a finished student or teacher on a split; what was written for exactly this is read, not done again.

    cache: where a teacher's tokens are.  found: the run's predictions, where they are at hand.
    Raises as `predict_run` and `judge`.
    """
    evaluation, made_from = evaluated_before(run, table, asked)
    was_there, files = evaluation is not None, evaluation_files(run, asked)
    if evaluation is None:
        from .compare import compare, latex
        from .evaluate import predict_run
        from .scores import judge

        if found is None:
            found = predict_run(run, table, cache, asked, predictions_path(run, asked))
        evaluation, confusion = judge(run, table, found, asked, made_from)
        publish(files[1], latex(compare([evaluation])).encode())
        evaluation.write(run.path / "evaluation" / asked.stem, confusion)
    return Evaluated(evaluation, files, was_there)


def evaluated_before(run: RunFolder, table: ClipTable, asked: Asked) -> tuple[Evaluation | None, str]:
    """Return what was written for exactly this, None if it has to be made, and the digest of all that decides it."""
    lists = [sorted(table.unseen), {head: sorted(names) for head, names in table.tail.items()}]
    made_from = digest([FORMAT, run.config, run.result, table.content_digest(), lists, asked.views])
    files = evaluation_files(run, asked)
    evaluation = Evaluation.read(files[-1], made_from, asked.draws)
    # Clips that failed are looked at again: they may have been mended.
    is_whole = evaluation is not None and not evaluation.failed and all(file.exists() for file in files)
    return evaluation if is_whole else None, made_from


def evaluation_files(run: RunFolder, asked: Asked) -> list[Path]:
    """Return the files of an evaluation: rows, the table for LaTeX, and all of it as JSON."""
    return [run.path / "evaluation" / f"{asked.stem}.{kind}" for kind in ("csv", "tex", "json")]


def predictions_path(run: RunFolder, asked: Asked) -> Path:
    """Return where the predictions of a run are kept."""
    return run.path / "evaluation" / f"{asked.stem}.safetensors"


def submit(
    run: RunFolder, table: ClipTable, cache: Place, asked: Asked, path: Path, supervision: Sequence[int]
) -> dict[str, str]:
    """Write a submission to EPIC-KITCHENS' challenge for all clips of a split; return clips that failed, and why."""
    from .challenge import require_submittable, write_submission
    from .evaluate import predict_run

    require_submittable(run, path)
    found = predict_run(run, table, cache, asked, predictions_path(run, asked))
    write_submission(path, found, table.clip_ids, supervision)
    return found.failed
