"""Accuracy over every subset of modalities: each backbone once per clip, the fusion block once per subset."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.annotations import ClipTable
from ..data.device import choose_device
from ..data.errors import MediaError, TableError
from ..data.modality import letters, subsets
from ..data.progress import watched
from ..data.runs import RunFolder
from ..fuse.logits import joined_logits
from ..fuse.metrics import accuracy, majority, wilson_bounds
from .model import ClipModel
from .results import Evaluation, SubsetRow
from .stream import ClipStream
from .student import load_student

BATCH = 16


@dataclass(frozen=True)
class Predictions:
    """Logits of n clips by subset and head, on the CPU.

    rows: [n] places in the clip table, without clips that failed.  present: [n, M] bool.
    logits: subset -> head -> [n, N_h].
    """

    rows: np.ndarray
    present: np.ndarray
    logits: dict[tuple[str, ...], dict[str, Tensor]]


@torch.inference_mode()
def subset_logits(
    student: ClipModel,
    stream: ClipStream,
    rows: np.ndarray,
    chosen: Sequence[tuple[str, ...]],
    device: torch.device,
    count: Callable[[int], None] = lambda n: None,
) -> Predictions:
    """Predict the clean view of the rows under each chosen subset.

    A clip that lacks a modality of the subset is predicted from what it has; with nothing left, from the learned
    tokens (or the CLS token) alone, so that every subset is judged on the same clips.
    """
    was_training = student.training
    student.eval()
    wanted = np.ones((len(rows), len(student.modalities)), bool)
    plan = [(rows[at : at + BATCH], wanted[at : at + BATCH]) for at in range(0, len(rows), BATCH)]
    masks = {subset: torch.tensor([m in subset for m in student.modalities], device=device) for subset in chosen}
    found: dict[tuple[str, ...], list[dict[str, Tensor]]] = {subset: [] for subset in chosen}
    read: list[np.ndarray] = []
    has: list[np.ndarray] = []
    for batch in stream.batches(plan, 0):
        present = batch.present.to(device)
        tokens = student.tokens({m: values.to(device) for m, values in batch.inputs.items()}, present)
        for subset, mask in masks.items():
            output = student.fusion(tokens, present & mask)
            found[subset].append({head: logits.float().cpu() for head, logits in output.logits.items()})
        read.append(batch.rows)
        count(len(batch.rows))
        has.append(batch.present.cpu().numpy())
    student.train(was_training)
    joined = {subset: joined_logits(student.fusion, parts) for subset, parts in found.items()}
    return Predictions(np.concatenate([rows[:0], *read]), np.concatenate([wanted[:0], *has]), joined)


def evaluate_run(run: RunFolder, table: ClipTable, split: str, device: str, made_from: str) -> Evaluation:
    """Evaluate a finished student on every subset of its modalities; labels come from the table as it is now.

    A modality that cannot be read counts as missing and its clip is named; a clip with nothing left is left out.
    Raises TableError if the split has no labelled clip, or one with a label that the student does not know, and
    MediaError if no clip can be read.
    """
    on = choose_device(device)
    student, data, described = load_student(run, on)
    labels = {head: torch.from_numpy(table.labels(head, tuple(names))) for head, names in described["classes"].items()}
    rows = table.rows(split)
    rows = rows[np.all([values[rows].numpy() >= 0 for values in labels.values()], axis=0)]
    if not len(rows):
        raise TableError(f"{table.path}: no labelled clip in split {split!r}. Choose another with --split.")
    stream = ClipStream(table, data, student.modalities, allow_failures=len(rows))
    with stream, watched("evaluate", len(rows), "clips") as progress:
        found = subset_logits(student, stream, rows, subsets(student.modalities), on, progress.advance)
    if not len(found.rows):
        clip_id, reason = next(iter(stream.failed.items()))
        raise MediaError(f"No clip of split {split!r} can be read, such as {clip_id}: {reason.rstrip('.')}. Mend it.")
    targets = {head: values[found.rows] for head, values in labels.items()}
    table_rows = []
    for subset, logits in found.logits.items():
        columns = [student.modalities.index(modality) for modality in subset]
        n_complete = int(found.present[:, columns].all(axis=1).sum())
        table_rows.append(_row(letters(subset), n_complete, accuracy(logits, targets), len(found.rows)))
    return Evaluation(run.path.name, split, majority(targets), tuple(table_rows), dict(stream.failed), made_from)


def _row(subset: str, n_complete: int, accuracies: dict[str, float], n: int) -> SubsetRow:
    bounds = {head: wilson_bounds(round(value * n), n) for head, value in accuracies.items()}
    low, high = ({head: found[side] for head, found in bounds.items()} for side in (0, 1))
    return SubsetRow(subset, n, n_complete, accuracies, low, high)
