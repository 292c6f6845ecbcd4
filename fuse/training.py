"""The training loop that teacher and student share: steps, learning rate, logs, checkpoints, validation."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..data.annotations import ClipTable
from ..data.device import choose_device
from ..data.errors import RunError, TableError
from ..data.progress import Task, watched
from ..data.runs import RunFolder
from .config import TrainingConfig
from .schedule import learning_rate, parameter_groups

logger = logging.getLogger(__name__)


class Course(Protocol):
    """What is particular to one of the two trainings."""

    steps_per_epoch: int

    def batches(self, epoch: int) -> Iterable[Any]:
        """Yield the batches of an epoch."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the loss parts by name; 'loss' is the one to minimise."""

    def validate(self) -> dict[str, float]:
        """Return accuracies by head and of the action, and 'loss', on the validation split (never on test)."""


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


def usable_rows(table: ClipTable, heads: tuple[str, ...], present: np.ndarray) -> dict[str, np.ndarray]:
    """Return the table rows of 'train' and 'val' that have a label in some head and a modality.

    present: [N, M] bool.  Raises TableError if a split has none left: nothing to learn from, or to choose by.
    """
    labelled = np.any([table.labels(head) >= 0 for head in heads], axis=0)
    usable = labelled & present.any(axis=1)
    rows = {split: table.rows(split)[usable[table.rows(split)]] for split in ("train", "val")}
    for split, found in rows.items():
        if not len(found):
            raise TableError(
                f"{table.path}: no labelled clip of split {split!r} has any of the modalities in use. "
                "Choose other modalities, or add clips."
            )
    return rows


def plain(found: dict[str, float]) -> dict[str, float | None]:
    """Return the numbers as JSON can hold them: what could not be measured (NaN) becomes None."""
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def prepare(config: TrainingConfig) -> torch.device:
    """Seed torch, set its threads, and return the device to train on."""
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    return choose_device(config.device)


def score(found: dict[str, float | None]) -> tuple[float, float]:
    """Return what the best checkpoint is chosen by: validation action accuracy, then the lower validation loss.

    Where no clip is labelled in every head there is no action accuracy, and the loss alone decides.
    """
    return found["action"] or 0.0, -found["loss"]


def fit(model: nn.Module, course: Course, config: Any, run: RunFolder) -> dict[str, Any]:
    """Train for config.epochs with AdamW and keep the last and the best weights; return the best epoch's metrics.

    The learning rate moves every step (sec. 4: linear warm-up, cosine back).  Raises RunError if the loss stops
    being finite.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.min_lr)
    best: dict[str, Any] = {}
    with watched(run.path.name, config.epochs, "epochs") as progress:
        for epoch in range(config.epochs):
            record = _epoch(model, course, config, optimizer, epoch)
            record["val"] = plain(course.validate())
            run.log(record)
            if not best or score(record["val"]) > score(best["val"]):
                best = record
                run.save_checkpoint("best", model.state_dict(), {"epoch": epoch, "val": record["val"]})
            _tell(progress, record)
    run.save_checkpoint("last", model.state_dict(), {"epoch": config.epochs - 1, "val": record["val"]})
    return best


def _epoch(model: nn.Module, course: Course, config: Any, optimizer: torch.optim.Optimizer, epoch: int) -> dict:
    """Run one epoch and return its log record: means of the loss parts, rate, and the share of time waiting."""
    model.train()
    waiting, start, sums, n_clips, rate = Waiting(), time.perf_counter(), {}, 0, 0.0
    for at, batch in enumerate(waiting.over(course.batches(epoch))):
        rate = learning_rate(
            epoch * course.steps_per_epoch + at,
            course.steps_per_epoch,
            max_lr=config.max_lr,
            min_lr=config.min_lr,
            warmup_epochs=config.warmup_epochs,
            epochs=config.epochs,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        parts = course.losses(batch)
        if not torch.isfinite(parts["loss"]):
            raise RunError(
                f"Epoch {epoch}, step {at}: the loss is {parts['loss'].item()}. "
                f"Lower max_lr (now {config.max_lr}) and start again."
            )
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(batch.rows)
        n_clips += len(batch.rows)
    seconds = time.perf_counter() - start
    record = {name: value / n_clips for name, value in sums.items()}
    return {
        "epoch": epoch,
        **record,
        "lr": rate,
        "clips_per_s": n_clips / seconds,
        "waiting_share": waiting.seconds / seconds,
    }


def _tell(progress: Task, record: dict[str, Any]) -> None:
    measured = {name: value for name, value in record["val"].items() if name != "loss" and value is not None}
    accuracies = " ".join(f"{name} {100 * value:.1f}" for name, value in measured.items())
    progress.advance(1, f"loss {record['loss']:.3f}, val {accuracies}")
    logger.info("epoch %d: loss %.4f, lr %.2e, val %s", record["epoch"], record["loss"], record["lr"], accuracies)
