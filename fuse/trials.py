"""A worker of a sweep: it claims trials and trains them, those that see the same batches together."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from ..data import progress
from ..data.annotations import ClipTable
from ..data.cache import Cache
from ..data.clips import read_clips
from ..data.config import DataConfig, digest
from ..data.device import enough_memory
from ..data.errors import ConfigError, IncompleteCacheError, KarmmaError, RunError, StaleCacheError, TableError
from ..data.runs import RunFolder
from .config import SweepConfig, TeacherConfig
from .loop import Onlooker, fit
from .space import Space
from .stage import describe_run, usable_selection
from .study import Claim, Study
from .teacher import Teacher
from .training import Training, begin, prepare

LOOK_AGAIN_S = 2.0


def objective(val: dict[str, float | None]) -> float:
    """Return what a sweep makes large: action accuracy on validation, or where there is none, minus the loss."""
    return -val["loss"] if val["action"] is None else val["action"]


@dataclass(frozen=True)
class Work:
    """All that a worker is told: the sweep's folder, clips, settings to start from, and how many trials there are."""

    folder: Path
    table: ClipTable
    data: DataConfig
    config: TeacherConfig
    sweep: SweepConfig
    n_trials: int


def work(task: Work, at: int) -> None:
    """Be worker number `at`, in a process of its own."""
    progress.silence()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep itself says when to stop
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        with enough_memory("the trials of a sweep", "Lower --together, --workers or --batch-size."):
            train_all(task, at)
    except KarmmaError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def train_all(task: Work, at: int = 0) -> None:
    """Train trials until all are done, by this process or others."""
    space = Space(task.sweep.space, task.data, task.config)
    with Study(task.folder, space, task.sweep, task.config.seed, task.config.warmup_epochs) as study:
        while not study.is_over(task.n_trials):
            claims = study.claim(task.sweep.together, task.n_trials)
            _train(task, study, space, claims, at)
            if not claims:  # others have the last ones, and may die
                time.sleep(LOOK_AGAIN_S)


def _end_with_parent() -> None:
    """Wait for the sweep's own process to end, and end this one then."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


class _Trials(Onlooker):
    """Tells the study how trials go; a trial that somebody else has taken over meanwhile is let go."""

    def __init__(self, study: Study, claims: dict[Training, Claim]) -> None:
        self.study, self.claims = study, claims

    def goes_on(self, training: Training, record: dict[str, Any]) -> bool:
        claim = self.claims[training]
        if not self.study.is_held(claim):
            return False
        is_worth_it = self.study.report(claim, record["epoch"], objective(record["val"]))
        if training.is_over:
            _close(self.study, claim, training)
        elif not is_worth_it:
            training.run.finish({"pruned": record["epoch"]})
            self.study.prune(claim)
        return is_worth_it

    def failed(self, training: Training, error: RunError) -> None:
        self.study.fail(self.claims[training], str(error))


def _train(task: Work, study: Study, space: Space, claims: Iterable[Claim], at: int) -> None:
    """Train trials to their end, each group of those that see the same batches in one pass."""
    groups: dict[str, dict[Training, Claim]] = {}
    try:
        for claim in claims:
            if (begun := _begun(task, study, space, claim, at)) is not None:
                batches, training = begun
                groups.setdefault(batches, {})[training] = claim
        for of in groups.values():
            fit(list(of), _Trials(study, of))
    except SystemExit:
        study.put_back([claim for claim in claims if study.is_held(claim)])
        raise


def _close(study: Study, claim: Claim, training: Training) -> None:
    """Write down what a trial came to; no logits, and no weights but the best."""
    best = training.position.best
    parameters = sum(p.numel() for p in training.model.parameters())
    training.run.finish({"epoch": best["epoch"], "val": best["val"], "parameters": parameters})
    study.complete(claim, objective(best["val"]))


def _begun(task: Work, study: Study, space: Space, claim: Claim, at: int) -> tuple[str, Training] | None:
    """Return what says which batches a trial sees, and its training, begun or taken up; None if there is nothing to do.

    A trial whose settings do not fit each other, or the cache, has failed.
    """
    run = RunFolder(task.folder / claim.name)
    if run.is_finished:  # but its process died before it could say so
        study.prune(claim) if "pruned" in run.result else study.complete(claim, objective(run.result["val"]))
        return None
    try:
        data, config = space.settings(claim.chosen)
        config = config.model_copy(update={"resume": True, "device": _own_device(config.device, at)})
        table = task.table if data == task.data else read_clips(data, data.heads)
        cache = Cache.open(data.cache)
        selection = usable_selection(cache, table, data, config)
        described = describe_run(cache, table, data, config, selection)
        teacher = Teacher(cache, table, selection, data, config, prepare(config))
    except (ConfigError, TableError, StaleCacheError, IncompleteCacheError) as error:
        study.fail(claim, str(error))
        return None
    training = begin(teacher.model, teacher, config, run, described)
    if training.is_over:  # all epochs are done, but its process died before it could say so
        _close(study, claim, training)
        return None
    batches = [described[name] for name in ("data", "contents", "clips", "views")]
    position = training.position.epoch, training.position.at
    return digest([batches, config.seed, config.batch_size, config.epochs, position]), training


def _own_device(device: str, at: int) -> str:
    """Return a GPU of its own for each worker, where there are several and none was asked for."""
    n = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return f"cuda:{at % n}" if n > 1 else device
