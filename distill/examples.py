"""Example clips of a run: what it says of them under each subset of modalities."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.annotations import ClipTable
from ..data.modality import letters
from ..data.runs import RunFolder
from ..data.thumbnails import thumbnails
from ..fuse.metrics import ACTION, confidence, predictions
from .scores import labels_of
from .student import run_data
from .subsets import Predictions

N_EACH = 3  # clips that are surely right, and as many surely wrong


@dataclass(frozen=True)
class Guess:
    """What a subset of modalities says: names by head, their joint probability 0..1, and whether all are right."""

    subset: str
    names: tuple[str, ...]
    sure: float
    is_right: bool


@dataclass(frozen=True)
class Example:
    """A clip, its true names by head, a picture as a data address ('' without one), and what subsets say of it."""

    clip_id: str
    truth: tuple[str, ...]
    picture: str
    guesses: tuple[Guess, ...]


def examples(run: RunFolder, table: ClipTable, found: Predictions, n_each: int = N_EACH) -> list[Example]:
    """Return the clips that all modalities together are surest of, n_each right ones, then n_each wrong ones."""
    labels = labels_of(run, table, found.rows)
    every = found.modalities
    said, sure = predictions(found.logits[every]), confidence(found.logits[every])[ACTION]
    whole = torch.stack([classes >= 0 for classes in labels.values()]).all(0)  # whatever a head is called
    hit = torch.stack([said[head] == classes for head, classes in labels.items()]).all(0)
    chosen = [*_surest(sure, whole & hit, n_each), *_surest(sure, whole & ~hit, n_each)]
    pictures = thumbnails([table.clip(found.rows[at]) for at in chosen], run_data(run.config))
    shown = ["" if jpeg is None else "data:image/jpeg;base64," + base64.b64encode(jpeg).decode() for jpeg in pictures]
    return [_example(run, table, found, labels, at, picture) for at, picture in zip(chosen, shown, strict=True)]


def _surest(sure: Tensor, among: Tensor, n: int) -> list[int]:
    order = torch.where(among, sure, -1.0).argsort(descending=True, stable=True)
    return order[: min(n, int(among.sum()))].tolist()


def _example(
    run: RunFolder, table: ClipTable, found: Predictions, labels: Mapping[str, Tensor], at: int, picture: str
) -> Example:
    classes, guesses = run.config["classes"], []
    for subset, logits in found.logits.items():
        own = {head: scores[at : at + 1] for head, scores in logits.items()}
        said = {head: int(index) for head, index in predictions(own).items()}
        is_right = all(said[head] == int(labels[head][at]) for head in classes)
        names = tuple(classes[head][index] for head, index in said.items())
        guesses.append(Guess(letters(subset), names, float(confidence(own)[ACTION]), is_right))
    truth = tuple(classes[head][int(labels[head][at])] for head in classes)
    return Example(str(table.clip_ids[found.rows[at]]), truth, picture, tuple(guesses))
