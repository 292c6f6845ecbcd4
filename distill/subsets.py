"""Logits of clips under every subset of modalities: each backbone runs once per clip, the fusion block per subset."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.batches import TokenReader
from ..data.modality import letters
from ..data.publish import publish
from ..fuse.logits import averaged, cached_batches, joined_logits
from ..fuse.model import FusionModel
from .model import ClipModel
from .stream import ClipStream

BATCH = 16

Subset = tuple[str, ...]
# Of one batch: rows [B] of the clip table, tokens by modality, present [B, M].
Fused = tuple[np.ndarray, dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Predictions:
    """Logits of n clips by subset and head, on the CPU.

    rows: [n] places in the clip table, without clips that failed.  present: [n, M] bool, what the clips have.
    logits: subset -> head -> [n, N_h].  failed: clip id -> reason, also of clips that lack a modality for it.
    """

    rows: np.ndarray
    present: np.ndarray
    logits: dict[Subset, dict[str, Tensor]]
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def modalities(self) -> Subset:
        """The largest subset, and what the columns of `present` are."""
        return max(self.logits, key=len)

    def at(self, places: np.ndarray) -> "Predictions":
        """Return the predictions at some of the n places, in their order."""
        some = torch.from_numpy(places)
        logits = {s: {head: part[some] for head, part in found.items()} for s, found in self.logits.items()}
        return Predictions(self.rows[places], self.present[places], logits, self.failed)

    def save(self, path: Path, clip_ids: np.ndarray, made_from: str) -> None:
        """Publish as safetensors; clip_ids: [n] of the rows.  made_from: digest of all that decides them."""
        from safetensors.torch import save

        tensors = {f"{letters(s)}/{head}": part for s, found in self.logits.items() for head, part in found.items()}
        tensors["present"] = torch.from_numpy(self.present)
        about = {"made_from": made_from, "clip_ids": clip_ids.tolist(), "failed": self.failed}
        publish(path, save(tensors, {"about": json.dumps(about)}))

    def with_failures(self, failed: dict[str, str], clip_ids: np.ndarray) -> "Predictions":
        """Return the predictions with these failures; a clip of them that has nothing left is left out.

        clip_ids: [N] of the whole table.
        """
        has_failed = np.isin(clip_ids[self.rows], list(failed))
        return replace(self.at(np.flatnonzero(~has_failed | self.present.any(axis=1))), failed=failed)

    @classmethod
    def load(cls, path: Path, clip_ids: np.ndarray, subsets: Sequence[Subset], made_from: str) -> "Predictions | None":
        """Return what was saved, None if there is nothing or it was made from something else.

        clip_ids: [N] of the whole table, in which the clips have their rows.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                if about["made_from"] != made_from:
                    return None
                found = {name: file.get_tensor(name) for name in file.keys()}
        except (FileNotFoundError, SafetensorError):  # what is damaged is made anew
            return None
        places = {clip_id: row for row, clip_id in enumerate(clip_ids.tolist())}
        rows = np.array([places[clip_id] for clip_id in about["clip_ids"]], np.int64)
        present, logits = found.pop("present").numpy(), {}
        for subset in subsets:
            own = f"{letters(subset)}/"
            logits[subset] = {name.removeprefix(own): part for name, part in found.items() if name.startswith(own)}
        return cls(rows, present, logits, about["failed"])


@torch.inference_mode()
def subset_logits(
    student: ClipModel,
    stream: ClipStream,
    rows: np.ndarray,
    chosen: Sequence[Subset],
    device: torch.device,
    count: Callable[[int], None] = lambda n: None,
    view: int = 0,
) -> Predictions:
    """Predict a view of the rows, by default the clean one, under each chosen subset.

    A clip that lacks a modality of the subset is predicted from what it has; with nothing left, from the learned
    tokens (or the CLS token) alone, so that every subset is judged on the same clips.
    """
    was_training = student.training
    student.eval()
    wanted = np.ones((len(rows), len(student.modalities)), bool)
    plan = [(rows[at : at + BATCH], wanted[at : at + BATCH]) for at in range(0, len(rows), BATCH)]

    def fused() -> Iterator[Fused]:
        for batch in stream.batches(plan, view):
            present = batch.present.to(device)
            inputs = {m: values.to(device, non_blocking=True) for m, values in batch.inputs.items()}
            yield batch.rows, student.tokens(inputs, present), present

    found = _collected(student.fusion, fused(), chosen, count)
    student.train(was_training)
    return Predictions(*found, dict(stream.failed))


@torch.inference_mode()
def teacher_logits(
    model: FusionModel,
    reader: TokenReader,
    rows: np.ndarray,
    chosen: Sequence[Subset],
    device: torch.device,
    count: Callable[[int], None] = lambda n: None,
    view: int = 0,
) -> Predictions:
    """Do as `subset_logits` from cached tokens, which have to be there in this view."""
    batches = cached_batches(reader, rows, view, device)
    fused = ((there.rows, averaged(there, model), there.present) for there in batches)
    return Predictions(*_collected(model.eval(), fused, chosen, count))


def _collected(
    fusion: FusionModel, batches: Iterable[Fused], chosen: Sequence[Subset], count: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, dict[Subset, dict[str, Tensor]]]:
    """Run the fusion model on every batch, once a subset; return rows, present and logits of all."""
    found: dict[Subset, list[dict[str, Tensor]]] = {subset: [] for subset in chosen}
    rows, has = [np.empty(0, np.int64)], [np.empty((0, len(fusion.modalities)), bool)]
    for some, tokens, present in batches:
        available = fusion.embedding.available(tokens, present)
        for subset, parts in found.items():
            left = present & torch.tensor([m in subset for m in fusion.modalities], device=present.device)
            output = fusion.fuse(fusion.embedding.join(available, left), left)
            parts.append({head: logits.float().cpu() for head, logits in output.logits.items()})
        rows.append(some)
        has.append(present.cpu().numpy())
        count(len(some))
    joined = {subset: joined_logits(fusion, parts) for subset, parts in found.items()}
    return np.concatenate(rows), np.concatenate(has), joined


def mended(saved: Predictions, again: Predictions, rows: np.ndarray) -> Predictions:
    """Return what was saved with some rows of the clip table predicted again, in the order of the table."""
    rest = saved.at(np.flatnonzero(~np.isin(saved.rows, rows)))
    logits = {
        s: {head: torch.cat([part, again.logits[s][head]]) for head, part in found.items()}
        for s, found in rest.logits.items()
    }
    present = np.concatenate([rest.present, again.present])
    both = Predictions(np.concatenate([rest.rows, again.rows]), present, logits, again.failed)
    return both.at(both.rows.argsort(kind="stable"))


def averaged_over(views: Sequence[Predictions]) -> Predictions:
    """Return predictions whose probabilities are the means over views, as logarithms; of clips that every view has."""
    first = views[0]
    if len(views) == 1:
        return first
    rows = reduce(np.intersect1d, [view.rows for view in views])
    views = [view.at(np.intersect1d(view.rows, rows, return_indices=True)[1]) for view in views]
    logits: dict[Subset, dict[str, Tensor]] = {}
    for subset, heads in first.logits.items():
        logits[subset] = {}
        for head in heads:
            mean = torch.stack([view.logits[subset][head].softmax(1) for view in views]).mean(0)
            logits[subset][head] = mean.clamp(min=torch.finfo(torch.float32).tiny).log()
    failed = {clip_id: reason for view in views for clip_id, reason in view.failed.items()}
    return Predictions(rows, views[0].present, logits, failed)
