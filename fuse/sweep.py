"""Sweep the teacher's options: many trainings over one cache, which is only read; the best settings come out.

Nothing at import needs torch: the workers have it.
"""

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.annotations import ClipTable
from ..data.cache import Cache
from ..data.config import DataConfig, digest
from ..data.errors import RunError
from ..data.progress import Task, watched
from ..data.publish import publish_json
from ..data.signals import deaf_to_interrupt
from .config import SweepConfig, TeacherConfig
from .space import Space
from .stage import describe_run, require_labels, require_theta, usable_selection

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from .study import Study
    from .trials import Work

DEFAULT_TRIALS = 20
LOOK_AGAIN_S = 0.5
PATIENCE_S = 10.0


@dataclass(frozen=True)
class SweepReport:
    """Where a sweep is, its trials, the best first, and the settings of the best."""

    folder: Path
    trials: list["FrozenTrial"]
    settings: tuple[DataConfig, TeacherConfig]
    files: list[Path]


def sweep_teacher(table: ClipTable, data: DataConfig, config: TeacherConfig, sweep: SweepConfig) -> SweepReport:
    """Train one teacher after another, or several at once, under the settings that `sweep` varies.

    The sweep's folder is named by a digest of all that decides it but the number of trials, so the same call goes on
    with it, wherever it is given.  Trials write no logits: the cache is only read.
    Raises ConfigError if the space does not fit, IncompleteCacheError or StaleCacheError if the cache is not what is
    asked for, RunError if no trial came to its end.
    """
    plan = plan_sweep(table, data, config, sweep)
    config, space, folder, n_trials = plan.config, plan.space, plan.folder, plan.n_trials
    publish_json(folder / "config.json", plan.described)

    from .study import Study
    from .sweep_report import is_complete, ranked, write_results
    from .trials import Work

    with Study(folder, space, sweep, config.seed, config.warmup_epochs) as study:
        if not study.is_over(n_trials):
            _run(Work(folder, table, data, config, sweep, n_trials), study)
        trials = study.trials()
    files, (best, *others) = write_results(folder, space, trials), ranked(trials)
    if not is_complete(best):
        reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
        raise RunError(f"{folder}: no trial came to its end. The first that failed: {', '.join(reasons[:1])}")
    return SweepReport(folder, [best, *others], space.settings(best.params), files)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that could begin: its folder, what it varies, the settings to start from, and how many trials it has.

    described: all that decides its results but the number of trials.
    """

    folder: Path
    space: Space
    config: TeacherConfig
    n_trials: int
    described: dict[str, Any]


def plan_sweep(table: ClipTable, data: DataConfig, config: TeacherConfig, sweep: SweepConfig) -> SweepPlan:
    """Return what `sweep_teacher` would do, and raise at once for what no trial could do; nothing is written."""
    if sweep.workers > 1 and not config.threads:  # part of what a result is, to the last bit
        config = config.model_copy(update={"threads": max(1, (os.cpu_count() or 1) // sweep.workers)})
    space = Space(sweep.space, data, config)
    require_labels(table, data.heads)
    cache = Cache.open(data.cache)
    selection = usable_selection(cache, table, data, config)
    for theta in space.thetas():
        require_theta(cache, selection, config.model_copy(update={"theta": theta}))
    described = describe_run(cache, table, data, config, selection)
    described |= {"kind": "sweep", "sweep": sweep.model_dump(mode="json", exclude={"trials", "workers", "together"})}
    folder = data.runs / f"sweep-{digest(described)[:8]}"
    return SweepPlan(folder, space, config, _n_trials(space, sweep), described)


def _n_trials(space: Space, sweep: SweepConfig) -> int:
    if sweep.sampler != "grid":
        return sweep.trials or DEFAULT_TRIALS
    n_cells = len(space.grid())
    return min(sweep.trials or n_cells, n_cells)


def _run(work: "Work", study: "Study") -> None:
    """Have all trials trained by workers, and show how far they are."""
    from .trials import be_worker

    spawn = multiprocessing.get_context("spawn")
    places = range(work.sweep.workers)
    workers = [spawn.Process(target=be_worker, args=(work, at), name=f"worker {at}") for at in places]
    with deaf_to_interrupt():
        for worker in workers:
            worker.start()
    try:
        before = _n_epochs(study.trials(), work)
        with watched("sweep", max(0, work.n_trials * work.config.epochs - before), "epochs") as shown:
            while any(worker.is_alive() for worker in workers):
                time.sleep(LOOK_AGAIN_S)
                _show(shown, study.trials(), work, before)
    finally:
        _stop(workers)
    if not study.is_over(work.n_trials):
        codes = ", ".join(f"{worker.name}: {worker.exitcode}" for worker in workers)
        raise RunError(
            f"{work.folder}: not all of {work.n_trials} trials are done, and the workers have ended (exit codes: "
            f"{codes}). Give the same command again to go on; if memory was short, lower --together or --workers."
        )


def _stop(workers: list[BaseProcess]) -> None:
    """End what still runs: in good order, and by force if it does not listen."""
    for end in (BaseProcess.terminate, BaseProcess.kill):
        for worker in workers:
            if worker.is_alive():
                end(worker)
        for worker in workers:
            worker.join(PATIENCE_S)


def _n_epochs(trials: list["FrozenTrial"], work: "Work") -> int:
    """Count epochs that are done, of trials that were ended all."""
    n = work.config.epochs
    return sum(n if t.state.is_finished() else min(n, 1 + max(t.intermediate_values, default=-1)) for t in trials)


def _show(shown: Task, trials: list["FrozenTrial"], work: "Work", before: int) -> None:
    """Show how far all trials are, and the best of them."""
    values = {trial.number: trial.value for trial in trials if trial.state.name == "COMPLETE"}
    best = max(values, key=values.get, default=None)
    n_done = sum(trial.state.is_finished() for trial in trials)
    said = "" if best is None else f", best {values[best]:.4f} of trial {best}"
    if n_new := _n_epochs(trials, work) - before - shown.done:
        shown.advance(n_new, f"{n_done} of {work.n_trials} trials{said}")
