"""The student's training: raw clips beside cached teacher logits, Eq. 5 with modality dropout."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..data.annotations import ClipTable
from ..data.batches import plan_epoch
from ..data.config import DataConfig
from ..data.decoded import DecodedClips
from ..data.device import arithmetic
from ..data.errors import MediaError
from ..data.modality import letters
from ..data.progress import watched
from ..data.runs import RunFolder
from ..fuse.loop import fit
from ..fuse.losses import count_labels, cross_entropy
from ..fuse.metrics import accuracy
from ..fuse.ranks import is_first, merged, n_ranks, over_ranks, own_part, wait
from ..fuse.seeds import clip_seeds
from ..fuse.training import begin, usable_rows
from .config import StudentConfig
from .dropout import seeded_dropout
from .losses import count_clips, kl_divergence
from .model import ClipModel
from .recompute import recompute_blocks
from .stream import ClipBatch, ClipStream
from .student import build_student
from .subsets import subset_logits
from .teacher import CachedTeacher

# A batch of a plan: rows [B] of the clip table, and which modalities [B, M] of them a step takes.
Drawn = tuple[np.ndarray, np.ndarray]


class Distillation:
    """One student in training, in a `with` block; a `Course` for `fit`."""

    def __init__(
        self,
        table: ClipTable,
        data: DataConfig,
        config: StudentConfig,
        teacher: CachedTeacher,
        known: tuple[np.ndarray, dict[str, str]] | None,
        device: torch.device,
    ) -> None:
        """known: present [N, M], which modalities each clip has, and clips that failed; None finds out by reading."""
        self.config, self.teacher, self.table, self.device = config, teacher, table, device
        self.labels = {head: torch.from_numpy(table.labels(head)) for head in data.heads}
        n_classes = {head: len(table.classes(head)) for head in data.heads}
        self.student = build_student(data, config, n_classes).to(device)
        for backbone in self.student.backbones.values() if config.recompute else ():
            recompute_blocks(backbone)
        if config.compile:
            self.student.compile()
        self._plan: tuple[int, list[Drawn]] = (-1, [])
        with ExitStack() as opened:  # what is open is closed if one of the next lines raises
            self.stream = self._open_stream(data, opened)
            self.present, failed = known or (self._survey(), {})
            self.stream.failed.update(failed)
            self.rows = usable_rows(table, data.heads, self.present)
            self._opened = opened.pop_all()
        self.steps_per_epoch = -(-len(self.rows["train"]) // config.batch_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def _open_stream(self, data: DataConfig, opened: ExitStack) -> ClipStream:
        decoded, limit = None, round(self.config.decoded_gb * 1e9)
        if limit:
            decoded = opened.enter_context(DecodedClips(self.table, data, self.student.modalities, limit, n_ranks()))
        stream = ClipStream(
            self.table,
            data,
            self.student.modalities,
            readers=self.config.readers,
            cache_mb=self.config.input_cache_mb,
            allow_failures=self.config.allow_failures,
            decoded=decoded,
        )
        return opened.enter_context(stream)

    def _survey(self) -> np.ndarray:
        """Find out by reading which modalities each clip has, [N, M] bool."""
        # Test clips are none of a training's business.
        rows = np.flatnonzero(self.table.split != "test")
        present = np.zeros((self.table.n_clips, len(self.student.modalities)), bool)
        own = own_part(rows)
        with watched("survey", len(own), "clips") as progress:
            found = torch.from_numpy(self.stream.survey(own, progress.advance))
        present[rows] = over_ranks(found.to(self.device)).cpu().numpy()
        return present

    def train(self, run: RunFolder, described: dict[str, Any]) -> None:
        """Train, or go on, and mark the run as finished."""
        self.teacher.require(self.rows["train"])
        with run.held() if is_first() else nullcontext():
            training = begin(self.student, self, self.config, run, described)
            self.stream.failed |= training.position.failed
            training.position.failed = self.stream.failed  # so that it is saved with the rest
            fit([training])
            training.finish()
            if is_first():
                run.finish({**training.result, "failed": self.stream.failed})
            wait()

    def plan(self, epoch: int) -> list[Drawn]:
        """Return the clips of each step of an epoch, and which modalities of them: from (seed, step, clip) alone."""
        if self._plan[0] != epoch:
            order = plan_epoch(self.rows["train"], self.config.batch_size, self.config.seed, epoch)
            first = epoch * self.steps_per_epoch
            self._plan = epoch, [(rows, self._drawn(rows, first + at)) for at, rows in enumerate(order)]
        return self._plan[1]

    def _drawn(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Return which modalities [B, M] of the clips are left after modality dropout."""
        present = torch.from_numpy(self.present[rows])
        return seeded_dropout(present, self.config.modality_dropout, self._seeds(rows, step)).numpy()

    def _seeds(self, rows: np.ndarray, step: int) -> list[int]:
        return clip_seeds(self.config.seed, step, self.table.clip_ids[rows].tolist())

    def about(self, epoch: int) -> dict[str, Any]:
        """Return how many clips were to be seen in which modalities, and a digest of (clip, modalities) in their order.

        Raises MediaError if more clips have failed on all ranks together than are allowed.
        """
        self.stream.failed |= merged(self.stream.failed, self.device)
        self.stream.require_few_failures()
        rows, wanted = (np.concatenate(each) for each in zip(*self.plan(epoch), strict=True))
        sets, counts = np.unique(wanted, axis=0, return_counts=True)
        names = [letters([m for m, has in zip(self.student.modalities, one, strict=True) if has]) for one in sets]
        text = "\n".join(self.table.clip_ids[rows].tolist()).encode() + wanted.tobytes()
        masks = dict(zip(names, counts.tolist(), strict=True))
        return {"masks": masks, "masks_digest": hashlib.sha256(text).hexdigest()[:16]}

    def batches(self, epoch: int, first: int = 0) -> Iterator[ClipBatch]:
        """Yield this rank's parts of an epoch's batches from step `first` on, in view epoch mod V.

        A dropped modality is neither decoded nor run.
        """
        plan = [(own_part(rows), own_part(wanted)) for rows, wanted in self.plan(epoch)[first:]]
        return self.stream.batches(plan, epoch % self.teacher.n_views)

    def learn(self, batch: ClipBatch, step: int) -> dict[str, Tensor]:
        """Take the gradients of Eq. 5, one part of the batch after the other; return its parts."""
        spoken = batch.rows[self.teacher.speaks(batch.rows, batch.view)]
        totals = count_labels(self._labels(batch.rows)), count_clips(spoken, self.device)
        names = ("loss", "ce", "kl") if self.teacher.store else ("loss", "ce")
        sums = {name: torch.zeros((), device=self.device) for name in names}
        for part in batch.parts(self.config.accumulate) if len(batch.rows) else ():
            found = self.losses(part, step, *totals)
            found["loss"].backward()
            for name, value in found.items():
                sums[name] += value.detach()
        return sums

    def losses(
        self, batch: ClipBatch, step: int = 0, n_labelled: Tensor | None = None, n_clips: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return Eq. 5: gamma CE + lambda KL, and its parts; without a teacher, CE alone.

        A clip that has none of the teacher's modalities has no part in KL.
        n_labelled, n_clips: those of a whole batch, of which this is a part; n_clips where the teacher has logits.
        """
        inputs = {modality: values.to(self.device) for modality, values in batch.inputs.items()}
        with arithmetic(self.config.precision, self.device):
            output = self.student(inputs, batch.present.to(self.device), self._seeds(batch.rows, step))
        ce = cross_entropy(output.logits, self._labels(batch.rows), n_labelled)
        if self.teacher.store is None:
            return {"loss": ce, "ce": ce}
        spoken = self.teacher.speaks(batch.rows, batch.view)
        cached = self.teacher.logits(batch.rows[spoken], batch.view)
        targets = {head: torch.from_numpy(values).to(self.device) for head, values in cached.items()}
        heard = torch.from_numpy(spoken).to(self.device)
        ours = {head: logits[heard] for head, logits in output.logits.items()}
        kl = kl_divergence(ours, targets, self.config.temperature, n_clips)
        return {"loss": self.config.gamma * ce + self.config.kl_lambda * kl, "ce": ce, "kl": kl}

    def _labels(self, rows: np.ndarray) -> dict[str, Tensor]:
        return {head: values[rows].to(self.device) for head, values in self.labels.items()}

    def validate(self, models: Sequence[nn.Module]) -> list[dict[str, float]]:
        """Return accuracy by head and action, and cross-entropy, of the clean validation clips, all modalities in."""
        return [self._validated(cast(ClipModel, model)) for model in models]  # as `self.student` is

    def _validated(self, model: ClipModel) -> dict[str, float]:
        every = self.student.modalities
        found = subset_logits(model, self.stream, own_part(self.rows["val"]), [every], self.device)
        rows = over_ranks(torch.from_numpy(found.rows).to(self.device)).cpu()
        logits = {head: over_ranks(part.to(self.device)).cpu() for head, part in found.logits[every].items()}
        if not len(rows):
            raise MediaError("No validation clip can be read, so there is nothing to choose weights by. Mend them.")
        labels = {head: values[rows] for head, values in self.labels.items()}
        return {**accuracy(logits, labels), "loss": cross_entropy(logits, labels).item()}
