"""A training, of teacher or student: its steps, learning rate, logs, checkpoints, and how it is taken up again."""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..data.annotations import ClipTable
from ..data.device import choose_device, has_bfloat16
from ..data.errors import RunError, TableError
from ..data.publish import plain
from ..data.runs import RunFolder
from .config import TrainingConfig
from .ranks import average_gradients, is_first, n_ranks, summed, wait
from .schedule import learning_rate, parameter_groups
from .seeds import clip_seeds

logger = logging.getLogger(__name__)


class Course(Protocol):
    """What is particular to one of the two trainings."""

    steps_per_epoch: int

    def batches(self, epoch: int, first: int) -> Iterable[Any]:
        """Yield the batches of an epoch from its step `first` on; of each batch, this rank's part."""

    def learn(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Add a batch's gradients to the model's; return the loss parts by name, 'loss' being what was minimised.

        Over several ranks, the mean of what they return is the loss of the whole batch.  step: counted from the start
        of the run, for what is drawn at random.
        """

    def about(self, epoch: int) -> dict[str, Any]:
        """Return what else belongs into an epoch's record."""

    def validate(self, models: Sequence[nn.Module]) -> list[dict[str, float]]:
        """Return each model's accuracies by head and of the action, and 'loss', on the validation split, never test."""


@dataclass
class Position:
    """Where a training is: the next step to take, and what its epoch has added up to so far.

    failed: clip id -> reason, of clips that could not be read whole until then.
    """

    epoch: int = 0
    at: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    n_clips: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Training:
    """One model on its way: it takes steps, closes epochs, and can be put down and taken up again at any step."""

    def __init__(self, model: nn.Module, course: Course, config: TrainingConfig, run: RunFolder) -> None:
        self.model, self.course, self.config, self.run = model, course, config, run
        self.optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.min_lr)
        self.position = Position()
        self._saved = time.monotonic()

    def step(self, batch: Any) -> None:
        """Learn from one batch; raises RunError if the loss stops being finite."""
        now = self.position
        step = now.epoch * self.course.steps_per_epoch + now.at
        self.model.train()
        # Whatever draws from torch's own generator depends on the step and not on what was drawn before.
        torch.manual_seed(clip_seeds(self.config.seed, step, [""])[0])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.course.learn(batch, step)
        average_gradients(self.model)
        means, n_clips = _over_all(parts, len(batch.rows))
        if not math.isfinite(means["loss"]):
            raise RunError(f"Epoch {now.epoch}, step {now.at}: the loss is {means['loss']}. {self._calmer}")
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        for name, value in means.items():
            now.sums[name] = now.sums.get(name, 0.0) + value * n_clips
        now.n_clips += n_clips
        now.at += 1

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (sec. 4: linear warm-up, cosine back)."""
        return learning_rate(
            step,
            self.course.steps_per_epoch,
            max_lr=self.config.max_lr,
            min_lr=self.config.min_lr,
            warmup_epochs=self.config.warmup_epochs,
            epochs=self.config.epochs,
        )

    def close_epoch(self, val: dict[str, float]) -> dict[str, Any]:
        """Log, keep the weights if validation says they are the best, and begin the next epoch; return the record.

        Raises RunError if the loss on validation is not finite.
        """
        now = self.position
        if not math.isfinite(val["loss"]):
            raise RunError(f"Epoch {now.epoch}: the loss on validation is {val['loss']}. {self._calmer}")
        # No clip at all, if all of them failed.
        means = {name: value / max(now.n_clips, 1) for name, value in now.sums.items()}
        record: dict[str, Any] = {"epoch": now.epoch, **means}
        record["lr"] = self.rate((now.epoch + 1) * self.course.steps_per_epoch - 1)
        record["clips_per_s"], record["waiting_share"] = now.n_clips / now.seconds, now.waiting / now.seconds
        record |= self.course.about(now.epoch)
        record["val"] = plain(val)
        best = record if not now.best or score(record["val"]) > score(now.best["val"]) else now.best
        if is_first():
            self.run.log(record)
            if best is record:
                self.run.save_checkpoint("best", self.model.state_dict(), {"epoch": now.epoch, "val": record["val"]})
        self.position = Position(now.epoch + 1, best=best, failed=now.failed)
        self.save()
        return record

    def save(self) -> None:
        """Write down all that it takes to go on from here."""
        if is_first():
            self.run.save_state(self.model, self.optimizer, vars(self.position))
        self._saved = time.monotonic()

    @property
    def is_save_due(self) -> bool:
        """Say whether the last time was so long ago that it is to be saved in the middle of an epoch."""
        return time.monotonic() - self._saved > 60 * self.config.save_minutes

    @property
    def _calmer(self) -> str:
        return f"Lower max_lr (now {self.config.max_lr}) and start again."

    def resume(self) -> bool:
        """Go back to what was saved last; False if nothing was."""
        found = self.run.load_state(self.model, self.optimizer)
        if found is None:
            return False
        self.position = Position(**found)
        return True

    @property
    def is_over(self) -> bool:
        """Say whether all epochs are done."""
        return self.position.epoch >= self.config.epochs

    @property
    def result(self) -> dict[str, Any]:
        """What the training came to: its best epoch, that epoch's validation, and the model's parameters."""
        best, parameters = self.position.best, sum(p.numel() for p in self.model.parameters())
        return {"epoch": best["epoch"], "val": best["val"], "parameters": parameters}

    def finish(self) -> dict[str, Any]:
        """Keep the last weights; return the best epoch's record."""
        if is_first():
            last = {"epoch": self.config.epochs - 1}
            self.run.save_checkpoint("last", self.model.state_dict(), last)
        return self.position.best


def begin(model: nn.Module, course: Course, config: TrainingConfig, run: RunFolder, described: Any) -> Training:
    """Return a training at its first step, or, with `config.resume`, where it was interrupted.

    Raises RunError if something is in the run's folder that would be lost.
    """
    run.require_free(config.resume)
    wait()  # nobody writes before all have looked
    training = Training(model, course, config, run)
    if training.resume():
        logger.info("%s: going on with epoch %d", run.path, training.position.epoch)
    elif config.resume:
        logger.warning("%s: nothing to go on with here; beginning with epoch 0", run.path)
    if is_first():
        run.start(described, training.position.epoch)
    return training


def _over_all(parts: dict[str, Tensor], n_clips: int) -> tuple[dict[str, float], int]:
    """Return the loss parts of the whole batch as numbers, and its clips, from those of this rank's part."""
    some = [value.detach().double() for value in parts.values()]
    *sums, n = summed(torch.stack([*some, some[0].new_tensor(n_clips)])).tolist()
    return {name: value / n_ranks() for name, value in zip(parts, sums, strict=True)}, round(n)


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


def prepare(config: TrainingConfig) -> torch.device:
    """Seed torch, set its threads, and return the device to train on."""
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    if config.precision == "bfloat16" and not has_bfloat16(device):
        logger.warning("This %s computes bfloat16 by way of float32, and slower than that. Use float32.", device.type)
    return device


def minus_loss(found: Mapping[str, float | None]) -> float:
    """Return what grows as the loss on validation gets smaller."""
    loss = found["loss"]
    assert loss is not None  # `close_epoch` lets no other pass
    return -loss


def score(found: Mapping[str, float | None]) -> tuple[float, float]:
    """Return what the best checkpoint is chosen by: validation action accuracy, then the lower validation loss.

    Where no clip is labelled in every head there is no action accuracy, and the loss alone decides.
    """
    return found["action"] or 0.0, minus_loss(found)
