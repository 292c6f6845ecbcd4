"""The student's training: raw clips beside cached teacher logits, Eq. 5 with modality dropout."""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..data.annotations import ClipTable
from ..data.batches import plan_epoch
from ..data.config import DataConfig
from ..data.device import arithmetic
from ..data.progress import watched
from ..data.runs import RunFolder
from ..fuse.loop import fit
from ..fuse.losses import cross_entropy
from ..fuse.metrics import accuracy
from ..fuse.training import begin, prepare, usable_rows
from .config import StudentConfig
from .dropout import modality_dropout
from .evaluate import subset_logits
from .losses import kl_divergence
from .stream import ClipBatch, ClipStream
from .student import build_student
from .teacher import CachedTeacher


class Distillation:
    """One student in training, in a `with` block; a `Course` for `fit`."""

    def __init__(
        self,
        table: ClipTable,
        data: DataConfig,
        config: StudentConfig,
        teacher: CachedTeacher,
        present: np.ndarray | None,
    ) -> None:
        self.config, self.teacher, self.data = config, teacher, data
        self.device = prepare(config)
        self.labels = {head: torch.from_numpy(table.labels(head)) for head in data.heads}
        n_classes = {head: len(table.classes(head)) for head in data.heads}
        self.student = build_student(data, config, n_classes).to(self.device)
        if config.compile:
            self.student.compile()
        self.stream = ClipStream(
            table,
            data,
            self.student.modalities,
            readers=config.readers,
            cache_mb=config.input_cache_mb,
            allow_failures=config.allow_failures,
        )
        if present is None:  # test clips are none of a training's business
            rows = np.flatnonzero(table.split != "test")
            present = np.zeros((table.n_clips, len(self.student.modalities)), bool)
            with watched("survey", len(rows), "clips") as progress:
                present[rows] = self.stream.survey(rows, progress.advance)
        self.present = present
        self.rows = usable_rows(table, data.heads, present)
        self.steps_per_epoch = -(-len(self.rows["train"]) // config.batch_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.__exit__()

    def train(self, run: RunFolder, described: dict[str, Any]) -> None:
        """Train and mark the run as finished."""
        self.teacher.require(self.rows["train"])
        with run.held():
            training = begin(self.student, self, self.config, run, described)
            fit([training])
            training.finish()
            run.finish({**training.result, "failed": self.stream.failed})

    def masks(self, epoch: int) -> np.ndarray:
        """Return which modalities of each clip an epoch uses, [N, M] bool, from seed, epoch and place alone."""
        rows, out = self.rows["train"], self.present.copy()
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        out[rows] = modality_dropout(
            torch.from_numpy(self.present[rows]), self.config.modality_dropout, generator
        ).numpy()
        return out

    def batches(self, epoch: int, first: int = 0) -> Iterator[ClipBatch]:
        """Yield an epoch's batches from step `first` on; a dropped modality is neither decoded nor run."""
        masks, view = self.masks(epoch), epoch % self.teacher.n_views
        plan = plan_epoch(self.rows["train"], self.config.batch_size, self.config.seed, epoch)[first:]
        return self.stream.batches([(rows, masks[rows]) for rows in plan], view)

    def losses(self, batch: ClipBatch, step: int = 0) -> dict[str, Tensor]:
        """Return Eq. 5: gamma CE + lambda KL, and its parts; without a teacher, CE alone."""
        inputs = {modality: values.to(self.device) for modality, values in batch.inputs.items()}
        with arithmetic(self.config.precision, self.device):
            output = self.student(inputs, batch.present.to(self.device))
        labels = {head: values[batch.rows].to(self.device) for head, values in self.labels.items()}
        ce = cross_entropy(output.logits, labels)
        cached = self.teacher.logits(batch.rows, batch.view)
        if cached is None:
            return {"loss": ce, "ce": ce}
        targets = {head: torch.from_numpy(values).to(self.device) for head, values in cached.items()}
        kl = kl_divergence(output.logits, targets, self.config.temperature)
        return {"loss": self.config.gamma * ce + self.config.kl_lambda * kl, "ce": ce, "kl": kl}

    def validate(self, models: Sequence[nn.Module]) -> list[dict[str, float]]:
        """Return accuracy by head and action, and cross-entropy, of the clean validation clips, all modalities in."""
        return [self._validated(model) for model in models]

    def _validated(self, model: nn.Module) -> dict[str, float]:
        every = self.student.modalities
        found = subset_logits(model, self.stream, self.rows["val"], [every], self.device)
        labels = {head: values[found.rows] for head, values in self.labels.items()}
        logits = found.logits[every]
        return {**accuracy(logits, labels), "loss": cross_entropy(logits, labels).item()}
