"""A worker of a sweep: it claims trials and trains them, those that see the same batches together."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from ..data import progress
from ..data.annotations import ClipTable
from ..data.cache import Cache
from ..data.config import DataConfig, digest
from ..data.device import enough_memory
from ..data.errors import KarmmaError, MemoryShortError, RunError, one_line
from ..data.places import storage_errors
from ..data.runs import RunFolder
from ..data.verify import Sound
from .config import SweepConfig, TeacherConfig
from .loop import Onlooker, fit
from .space import Space
from .stage import describe_run, usable_selection
from .study import Claim, Study
from .teacher import Teacher
from .training import Training, begin, prepare

LOOK_AGAIN_S = 2.0


def objective(val: Mapping[str, float | None], share: float = 1.0) -> float:
    """Return what a sweep makes large: action accuracy on validation, or where there is none, minus the loss.

    share: of the labelled validation clips, those that have a modality of this trial; the others count as wrong, so
    that trials of other modalities are judged on the same clips.
    """
    return -val["loss"] if val["action"] is None else share * val["action"]


@dataclass(frozen=True)
class Work:
    """All that a worker is told: the sweep's folder, clips, settings to start from, and how many trials there are."""

    folder: Path
    table: ClipTable
    data: DataConfig
    config: TeacherConfig
    sweep: SweepConfig
    n_trials: int


def be_worker(work: Work, at: int) -> None:
    """Be worker number `at`, in a process of its own."""
    progress.silence()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        with enough_memory("the trials of a sweep", "Lower --together, --workers or --batch-size."):
            train_all(work, at)
    except (KarmmaError, *storage_errors()) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def train_all(work: Work, at: int = 0) -> None:
    """Train trials until all are done, by this process or others."""
    space = Space(work.sweep.space, work.data, work.config)
    with Study(work.folder, space, work.sweep, work.config.seed, work.config.warmup_epochs) as study:
        worker = _Worker(work, study, space, at)
        while not study.is_over(work.n_trials):
            claims = study.claim(work.sweep.together, work.n_trials)
            worker.train(claims)
            if not claims:  # others have the last ones, and may die
                time.sleep(LOOK_AGAIN_S)


def _end_with_parent() -> None:
    """Wait for the sweep's own process to end, and end this one then."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class _Trial:
    """A claim under way; share: see `objective`."""

    claim: Claim
    training: Training
    share: float

    def close(self, study: Study) -> None:
        """Write down what a trial came to; no logits, and no weights but the best."""
        result = self.training.result
        value = objective(result["val"], self.share)
        self.training.run.finish({**result, "value": value})
        study.complete(self.claim, value)


class _Judge(Onlooker):
    """Tells the study how trials go; one that somebody else has taken over meanwhile is let go."""

    def __init__(self, study: Study, trials: Iterable[_Trial]) -> None:
        self.study, self.trials = study, {trial.training: trial for trial in trials}

    def owns(self, training: Training) -> bool:
        """Say whether this process still holds the trial's lease."""
        return self.study.is_held(self.trials[training].claim)

    def goes_on(self, training: Training, record: dict[str, Any]) -> bool:
        """Report an epoch, and close the trial if it is over or not worth going on with."""
        trial = self.trials[training]
        is_worth_it = self.study.report(trial.claim, record["epoch"], objective(record["val"], trial.share))
        if training.is_over:
            trial.close(self.study)
        elif not is_worth_it:
            training.run.finish({"pruned": record["epoch"]})
            self.study.prune(trial.claim)
        return is_worth_it

    def failed(self, training: Training, error: KarmmaError) -> None:
        """Close the trial with the reason."""
        training.run.finish({"failed": str(error)})
        self.study.fail(self.trials[training].claim, str(error))


@dataclass(frozen=True)
class _Worker:
    """What the trials of one process have in common; sound: shards of the cache that one of them has looked at."""

    work: Work
    study: Study
    space: Space
    at: int
    sound: Sound = field(default_factory=set)

    def train(self, claims: Sequence[Claim]) -> None:
        """Train trials to their end, each group of those that see the same batches in one pass."""
        groups: dict[str, list[_Trial]] = {}
        try:
            for claim in claims:
                if (begun := self._begun(claim)) is not None:
                    batches, trial = begun
                    groups.setdefault(batches, []).append(trial)
            for trials in groups.values():
                fit([trial.training for trial in trials], _Judge(self.study, trials))
        except SystemExit:
            self.study.put_back(claims)
            raise
        except (KarmmaError, RuntimeError, MemoryError) as error:
            self.study.note(claims, one_line(error))
            raise

    def _begun(self, claim: Claim) -> tuple[str, _Trial] | None:
        """Return what says which batches a trial sees, and the trial, begun or taken up; None if nothing is to do.

        A trial whose settings do not fit each other, or the cache, has failed.
        """
        run = RunFolder(self.work.folder / claim.name)
        if run.is_finished:  # but its process died before it could say so
            _tell(self.study, claim, run.result)
            return None
        try:
            data, config = self.space.settings(claim.chosen)
            config = config.model_copy(update={"resume": True, "device": _own_device(config.device, self.at)})
            cache, table = Cache.open(data.cache), self.work.table
            selection = usable_selection(cache, table, data, config)
            described = describe_run(cache, table, data, config, selection)
            teacher = Teacher(cache, table, selection, data, config, prepare(config), self.sound)
        except MemoryShortError:
            raise
        except KarmmaError as error:
            self.study.fail(claim, str(error))
            return None
        try:
            training = begin(teacher.model, teacher, config, run, described)
        except RunError as error:  # what it would go on with is damaged
            self.study.fail(claim, str(error))
            return None
        trial = _Trial(claim, training, _share(teacher) if self.space.varies_data else 1.0)
        if training.is_over:  # all epochs are done, but its process died before it could say so
            trial.close(self.study)
            return None
        batches = [described[name] for name in ("data", "contents", "clips", "views")]
        position = training.position.epoch, training.position.at
        return digest([batches, config.seed, config.batch_size, config.epochs, position]), trial


def _tell(study: Study, claim: Claim, result: Mapping[str, Any]) -> None:
    """Close a trial as its run was."""
    if "pruned" in result:
        study.prune(claim)
    elif "failed" in result:
        study.fail(claim, result["failed"])
    else:
        study.complete(claim, result["value"])


def _share(teacher: Teacher) -> float:
    """Return which share of the validation clips with all labels have a modality of the teacher."""
    labelled = np.all([teacher.table.labels(head) >= 0 for head in teacher.classes], axis=0)
    n_all = labelled[teacher.table.rows("val")].sum()
    return float(labelled[teacher.rows["val"]].sum() / n_all) if n_all else 1.0


def _own_device(device: str, at: int) -> str:
    """Return a GPU of its own for each worker, where there are several and none was asked for."""
    n = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return f"cuda:{at % n}" if n > 1 else device
