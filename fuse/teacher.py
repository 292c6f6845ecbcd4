"""The teacher's training: a course over cached tokens, and the logits it leaves behind."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.annotations import ClipTable
from ..data.batches import TokenBatch, TokenReader, plan_epoch
from ..data.cache import Cache, table_digests
from ..data.config import DataConfig
from ..data.device import arithmetic
from ..data.identity import tensors_digest
from ..data.runs import RunFolder
from ..data.selection import Selection
from .config import TeacherConfig
from .logits import run_teacher, write_logits
from .losses import cross_entropy, info_nce
from .metrics import accuracy
from .model import build_fusion
from .training import fit, prepare, usable_rows


class Teacher:
    """One teacher in training; a `Course` for `fit`."""

    def __init__(
        self, cache: Cache, table: ClipTable, selection: Selection, data: DataConfig, config: TeacherConfig
    ) -> None:
        self.cache, self.table, self.config, self.selection = cache, table, config, selection
        self.device = prepare(config)
        self.reader = TokenReader(selection.stores, cache.rows(table.clip_ids), pin=self.device.type == "cuda")
        self.labels = {head: torch.from_numpy(table.labels(head)) for head in data.heads}
        self.classes = {head: list(table.classes(head)) for head in data.heads}
        present = self.reader.present(np.arange(table.n_clips), 0)
        self.rows = usable_rows(table, data.heads, present)
        self.steps_per_epoch = -(-len(self.rows["train"]) // config.batch_size)
        stores = selection.stores
        self.model = build_fusion(
            {m: store.width for m, store in stores.items()},
            {m: store.k for m, store in stores.items()},
            {head: len(names) for head, names in self.classes.items()},
            config,
        ).to(self.device)
        if config.compile:
            self.model.compile()

    def train(self, run: RunFolder, described: dict[str, Any]) -> None:
        """Train, then write the logits of the best weights, then mark the run as finished."""
        run.start(described)
        best = fit(self.model, self, self.config, run)
        teacher = self.speak(run, described)
        parameters = sum(p.numel() for p in self.model.parameters())
        run.finish({"teacher": teacher, "epoch": best["epoch"], "val": best["val"], "parameters": parameters})

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

    def batches(self, epoch: int) -> Iterator[TokenBatch]:
        """Yield the training batches of an epoch, in view epoch mod V."""
        plan = plan_epoch(self.rows["train"], self.config.batch_size, self.config.seed, epoch)
        yield from self.reader.batches(plan, epoch % self.selection.n_views)

    def losses(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return Eq. 3: alpha CE + beta InfoNCE, and its parts."""
        tokens = {name: values.to(self.device, non_blocking=True).float() for name, values in batch.tokens.items()}
        present = batch.present.to(self.device)
        with arithmetic(self.config.precision, self.device):
            output = self.model(tokens, present)
        labels = {head: values[batch.rows].to(self.device) for head, values in self.labels.items()}
        ce = cross_entropy(output.logits, labels)
        aligned = info_nce(output.tokens, self.config.tau, present, self.config.symmetric)
        return {"loss": self.config.alpha * ce + self.config.beta * aligned, "ce": ce, "info_nce": aligned}

    def validate(self) -> dict[str, float]:
        """Return accuracy by head and action, and cross-entropy, of the clean view of the validation clips."""
        rows = self.rows["val"]
        found = [logits for _, logits in run_teacher(self.model, self.reader, rows, 0, self.device)]
        logits = {head: torch.cat([part[head] for part in found]) for head in self.classes}
        labels = {head: values[rows] for head, values in self.labels.items()}
        return {**accuracy(logits, labels), "loss": cross_entropy(logits, labels).item()}
