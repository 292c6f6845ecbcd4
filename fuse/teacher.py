"""The teacher's training: a course over cached tokens, and the logits it leaves behind."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..data.annotations import ClipTable
from ..data.batches import TokenBatch, TokenReader, plan_epoch
from ..data.cache import Cache, table_digests
from ..data.config import DataConfig
from ..data.device import arithmetic
from ..data.identity import tensors_digest
from ..data.runs import RunFolder
from ..data.selection import Selection
from ..data.verify import FirstSight, Sound
from .config import TeacherConfig
from .dropout import seeded_dropout
from .logits import averaged, build_teacher, on_device, shared_logits, write_logits
from .loop import fit
from .losses import cross_entropy, info_nce
from .metrics import accuracy
from .model import FusionModel
from .ranks import is_first, own_part, wait
from .seeds import clip_seeds
from .training import Training, begin, usable_rows


class Teacher:
    """One teacher in training; a `Course` for `fit`.  sound: shards found sound before, see `FirstSight`."""

    def __init__(
        self,
        cache: Cache,
        table: ClipTable,
        selection: Selection,
        data: DataConfig,
        config: TeacherConfig,
        device: torch.device,
        sound: Sound | None = None,
    ) -> None:
        self.cache, self.table, self.config, self.selection = cache, table, config, selection
        self.device = device
        rows, pin = cache.rows(table.clip_ids), self.device.type == "cuda"
        self.reader = TokenReader(selection.stores, rows, pin, FirstSight(cache, selection.stores, sound))
        self.labels = {head: torch.from_numpy(table.labels(head)) for head in data.heads}
        self.classes = {head: list(table.classes(head)) for head in data.heads}
        present = self.reader.present(np.arange(table.n_clips), 0)
        self.rows = usable_rows(table, data.heads, present)
        self.steps_per_epoch = -(-len(self.rows["train"]) // config.batch_size)
        n_classes = {head: len(names) for head, names in self.classes.items()}
        self.model = build_teacher(selection.stores, n_classes, config).to(self.device)
        if config.compile:
            self.model.compile()

    def train(self, run: RunFolder, described: dict[str, Any]) -> None:
        """Train, or go on; then write the logits of the best weights, then mark the run as finished."""
        with run.held() if is_first() else nullcontext():
            training = begin(self.model, self, self.config, run, described)
            fit([training])
            self.conclude(training, described)

    def conclude(self, training: Training, described: dict[str, Any]) -> None:
        """Write what a training that is over leaves behind."""
        training.finish()
        wait()  # for the first rank's checkpoints
        teacher = self.speak(training.run, described)
        if is_first():
            training.run.finish({"teacher": teacher, **training.result})
        wait()

    def speak(self, run: RunFolder, described: dict[str, Any]) -> str:
        """Write the logits of the run's best weights for every clip and view; return the teacher's digest."""
        self.model.load_state_dict(run.load_checkpoint("best"))
        teacher = tensors_digest(self.model.state_dict())
        made_from = np.full(self.cache.n_clips, "", "<U8")
        made_from[self.reader.cache_rows] = table_digests(self.table)
        attributes = {
            "teacher": teacher,
            "run": run.path.name,
            "classes": self.classes,
            "inputs": described["inputs"],
            "tokens": described["tokens"],
        }
        write_logits(
            self.model,
            self.reader,
            self.cache.logits_path(teacher),
            attributes,
            made_from=made_from,
            n_views=self.selection.n_views,
            device=self.device,
        )
        return teacher

    def batches(self, epoch: int, first: int = 0) -> Iterator[TokenBatch]:
        """Yield the training batches of an epoch from step `first` on, in view epoch mod V."""
        plan = plan_epoch(self.rows["train"], self.config.batch_size, self.config.seed, epoch)[first:]
        for batch in self.reader.batches([own_part(rows) for rows in plan], epoch % self.selection.n_views):
            yield on_device(batch, self.device)

    def learn(self, batch: TokenBatch, step: int) -> dict[str, Tensor]:
        """Take the gradients of Eq. 3; return its parts."""
        parts = self.losses(batch, step)
        parts["loss"].backward()
        return parts

    def about(self, epoch: int) -> dict[str, Any]:
        """Add nothing to an epoch's record."""
        return {}

    def losses(self, batch: TokenBatch, step: int = 0) -> dict[str, Tensor]:
        """Return Eq. 3: alpha CE + beta InfoNCE, and its parts."""
        tokens = averaged(batch, self.model)
        seeds = clip_seeds(self.config.seed, step, self.table.clip_ids[batch.rows].tolist())
        present = batch.present
        if self.config.modality_dropout:
            present = seeded_dropout(present, self.config.modality_dropout, seeds)
        with arithmetic(self.config.precision, self.device):
            output = self.model(tokens, present, seeds)
        labels = {head: values[batch.rows].to(self.device) for head, values in self.labels.items()}
        ce = cross_entropy(output.logits, labels)
        aligned = info_nce(output.tokens, self.config.tau, present, self.config.symmetric)
        return {"loss": self.config.alpha * ce + self.config.beta * aligned, "ce": ce, "info_nce": aligned}

    def validate(self, models: Sequence[nn.Module]) -> list[dict[str, float]]:
        """Return accuracy by head and action, and cross-entropy, of the clean view of the validation clips."""
        rows = self.rows["val"]
        labels = {head: values[rows] for head, values in self.labels.items()}
        fusing = cast(Sequence[FusionModel], models)  # as `self.model` is
        found = shared_logits(fusing, self.reader, rows, 0, self.device)
        return [{**accuracy(logits, labels), "loss": cross_entropy(logits, labels).item()} for logits in found]
