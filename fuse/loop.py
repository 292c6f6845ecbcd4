"""The loop that trains one model, or several on the same batches: steps, epochs, and who is told."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.errors import KarmmaError, RunError
from ..data.progress import Task, watched
from .training import Course, Training

logger = logging.getLogger(__name__)


@dataclass
class Waiting:
    """Seconds spent waiting for the next batch, out of all."""

    seconds: float = 0.0

    def over(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Pass batches on and time how long each was waited for."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield batch


class Onlooker:
    """Who is told how trainings go, and may end them; this one lets them."""

    def owns(self, training: Training) -> bool:
        """Say, before anything is written, whether the run is still this process's."""
        return True

    def goes_on(self, training: Training, record: dict[str, Any]) -> bool:
        """Say, after an epoch and its record, whether to go on."""
        return True

    def failed(self, training: Training, error: KarmmaError) -> None:
        """Take note that a training cannot go on."""
        raise error


def fit(trainings: Sequence[Training], onlooker: Onlooker | None = None) -> None:
    """Train several models on the same batches, each read once, until all are over.

    The trainings share clips, seed, batch size, number of epochs and where they are.  Raises RunError if a loss stops
    being finite and the onlooker does not take it.
    """
    lead, onlooker = trainings[0], onlooker or Onlooker()
    steps, going = lead.course.steps_per_epoch, list(trainings)
    name, total = lead.run.path.name, (lead.config.epochs - lead.position.epoch) * steps - lead.position.at
    with watched(name, total, "steps") as shown:
        while going and not going[0].is_over:
            going = _epoch(lead.course, going, onlooker, shown)
            if not going:  # the clips of validation would be read for nobody
                break
            found = lead.course.validate([training.model for training in going])
            closed = [_closed(training, val, onlooker) for training, val in zip(going, found, strict=True)]
            for record in [record for record in closed if record][:1]:
                _tell(shown, record)
            going = [t for t, record in zip(going, closed, strict=True) if record and onlooker.goes_on(t, record)]


def _epoch(course: Course, trainings: list[Training], onlooker: Onlooker, shown: Task) -> list[Training]:
    """Take all steps that are left of an epoch; return the trainings that came to its end."""
    going, waiting, last = list(trainings), Waiting(), time.perf_counter()
    for batch in waiting.over(course.batches(going[0].position.epoch, going[0].position.at)):
        going = [training for training in going if _has_learned(training, batch, onlooker)]
        if not going:
            break
        now, waited = time.perf_counter(), waiting.seconds
        for training in going:
            training.position.seconds += now - last
            training.position.waiting += waited
            if training.is_save_due and onlooker.owns(training):
                training.save()
        last, waiting.seconds = now, 0.0
        found = going[0].position
        shown.advance(1, f"epoch {found.epoch}, loss {found.sums['loss'] / max(found.n_clips, 1):.3f}")
    return going


def _has_learned(training: Training, batch: Any, onlooker: Onlooker) -> bool:
    try:
        training.step(batch)
    except RunError as error:
        onlooker.failed(training, error)
        return False
    return True


def _closed(training: Training, val: dict[str, float], onlooker: Onlooker) -> dict[str, Any] | None:
    """Close an epoch and return its record; None if the training is no longer ours, or cannot go on."""
    if not onlooker.owns(training):
        return None
    try:
        return training.close_epoch(val)
    except RunError as error:
        onlooker.failed(training, error)
        return None


def _tell(shown: Task, record: dict[str, Any]) -> None:
    measured = {name: value for name, value in record["val"].items() if name != "loss" and value is not None}
    accuracies = " ".join(f"{name} {100 * value:.1f}" for name, value in measured.items())
    shown.advance(0, f"epoch {record['epoch']}, loss {record['loss']:.3f}, val {accuracies}")
    logger.info("epoch %d: loss %.4f, lr %.2e, val %s", record["epoch"], record["loss"], record["lr"], accuracies)
