"""The trials of a sweep in one Optuna journal: processes of any machines claim them, and take over those of the dead.

A trial that is claimed is held by a lease.  Who claims holds the planner's, so no trial is claimed twice, and no more
are made than were asked for.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from ..data.leases import Leases
from .config import SweepConfig
from .space import Space

# A trial whose process died so often since its last epoch is given up: it would take down one after another.
ATTEMPTS = 3
ANY_NUMBER = 2**32


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on: its number, and the values chosen for it."""

    number: int
    chosen: dict[str, Any]
    trial: optuna.Trial

    @property
    def name(self) -> str:
        """The name of its run folder and of its lease."""
        return trial_name(self.number)


def trial_name(number: int) -> str:
    """Return the name of a trial's folder in that of the sweep."""
    return f"trial-{number:04d}"


class Study:
    """One sweep's journal and leases; used in a `with` block."""

    def __init__(self, folder: Path, space: Space, config: SweepConfig, seed: int, n_warmup: int = 0) -> None:
        """Open the journal in `folder`, or begin it.  n_warmup: epochs before which no trial is ended early."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # of a lock that the dead have left: it waits, and goes on
        folder.mkdir(parents=True, exist_ok=True)
        self.space, self.config, self.seed = space, config, seed
        self._pruner = _pruner(config.pruner, n_warmup)
        self._leases = Leases(folder / "leases")
        journal = str(folder / "journal.log")
        # A lock that is a file: Optuna's default, a link, stays for ever if its owner dies and the path is relative.
        lock = JournalFileOpenLock(journal)
        with self._leases.waiting_for("planner"):
            _mend(Path(journal), lock)
            self._storage = JournalStorage(JournalFileBackend(journal, lock))
            optuna.create_study(storage=self._storage, study_name="sweep", direction="maximize", load_if_exists=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leases.__exit__()

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, by number, as they are now."""
        return self._study(0).get_trials(deepcopy=False)

    def claim(self, n: int, total: int) -> list[Claim]:
        """Claim up to n trials: first those whose processes have died, then new ones, up to `total` of them."""
        with self._leases.waiting_for("planner"):
            claims: list[Claim] = []
            trials = self.trials()
            for found in (trial for trial in trials if trial.state == TrialState.RUNNING):
                if len(claims) < n and self._leases.take(trial_name(found.number)):
                    claims += self._taken_over(found)
            begun = [found for found in trials if found.state != TrialState.WAITING]
            for number in range(len(begun), min(total, len(begun) + n - len(claims))):
                study = self._study(number)
                if self.config.sampler == "grid" and number == len(self.trials()):
                    study.enqueue_trial(self.space.grid()[number])
                trial = study.ask()
                self._leases.take(trial_name(trial.number))
                claims.append(Claim(trial.number, self.space.suggest(trial), trial))
            return claims

    def is_over(self, total: int) -> bool:
        """Say whether `total` trials were begun and nobody works on one."""
        states = [found.state for found in self.trials() if found.state != TrialState.WAITING]
        return len(states) >= total and TrialState.RUNNING not in states

    def is_held(self, claim: Claim) -> bool:
        """Say whether a trial is still this process's own: nobody has taken it for dead meanwhile."""
        return self._leases.is_held(claim.name)

    def report(self, claim: Claim, epoch: int, value: float) -> bool:
        """Note what a trial has reached after an epoch; return whether it is worth going on."""
        if epoch not in self._frozen(claim).intermediate_values:
            claim.trial.report(value, epoch)
        return not claim.trial.should_prune()

    def complete(self, claim: Claim, value: float) -> None:
        """Close a trial that came to its end."""
        self._close(claim, TrialState.COMPLETE, value)

    def prune(self, claim: Claim) -> None:
        """Close a trial that is not worth going on with."""
        self._close(claim, TrialState.PRUNED)

    def fail(self, claim: Claim, reason: str) -> None:
        """Close a trial that cannot go on."""
        claim.trial.set_user_attr("reason", reason)
        self._close(claim, TrialState.FAIL)

    def note(self, claims: Sequence[Claim], error: str) -> None:
        """Write down of what the process dies, for who takes its trials over."""
        for claim in claims:
            if self.is_held(claim):
                claim.trial.set_user_attr("error", error)

    def put_back(self, claims: Sequence[Claim]) -> None:
        """Let others go on with trials, after an end in good order, which is not held against them."""
        for claim in claims:
            if self.is_held(claim):
                claim.trial.set_user_attr("attempts", 0)
                self._leases.give_back(claim.name)

    def _close(self, claim: Claim, state: TrialState, value: float | None = None) -> None:
        self._study(0).tell(claim.number, value, state, skip_if_finished=True)
        self._leases.give_back(claim.name)

    def _taken_over(self, found: FrozenTrial) -> list[Claim]:
        """Return the claim on a trial whose process has died; nothing if that happened too often."""
        trial = optuna.Trial(self._study(found.number), found._trial_id)
        claim = Claim(found.number, self.space.suggest(trial), trial)
        epoch, attempts = max(found.intermediate_values, default=-1), 1
        if found.user_attrs.get("at") == epoch:
            attempts = found.user_attrs["attempts"] + 1
        if attempts >= ATTEMPTS:
            error = found.user_attrs.get("error", "killed, perhaps because memory was short")
            self.fail(claim, f"its process died {attempts} times after epoch {epoch}, at last of this: {error}")
            return []
        trial.set_user_attr("at", epoch)
        trial.set_user_attr("attempts", attempts)
        return [claim]

    def _frozen(self, claim: Claim) -> FrozenTrial:
        return self.trials()[claim.number]

    def _study(self, number: int) -> optuna.Study:
        """Return the study with the sampler of a trial: what is drawn depends on its number, not on who draws."""
        seed = (self.seed * 1_000_003 + number) % ANY_NUMBER
        sampler: BaseSampler = TPESampler(seed=seed) if self.config.sampler == "tpe" else RandomSampler(seed=seed)
        return optuna.load_study(study_name="sweep", storage=self._storage, sampler=sampler, pruner=self._pruner)


def _mend(journal: Path, lock: JournalFileOpenLock) -> None:
    """Cut off a line that a full disk or a crash of the machine has left half written: nobody could read on."""
    lock.acquire()
    try:
        if journal.exists() and (text := journal.read_bytes()) and not text.endswith(b"\n"):
            os.truncate(journal, text.rfind(b"\n") + 1)
    finally:
        lock.release()


def _pruner(name: str, n_warmup: int) -> BasePruner:
    if name == "median":
        return MedianPruner(n_warmup_steps=n_warmup)
    return SuccessiveHalvingPruner(min_resource=max(1, n_warmup)) if name == "halving" else NopPruner()
