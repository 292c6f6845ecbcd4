"""Does an exported student answer as the student does?  For every subset of modalities, in batches of several sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ..data.modality import subsets
from ..data.noise import noise
from .graph import PRESENT
from .model import ClipModel

# Inputs by name, `present` among them, to logits by head.
Answer = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Agreement:
    """The largest difference of a logit, over so many clips; infinite if a head is missing or is not a number."""

    difference: float
    n_clips: int


@torch.no_grad()
def agreement(student: ClipModel, answer: Answer) -> Agreement:
    """Compare an export with its student, which is in evaluation mode, on made-up clips of every subset and of none.

    They come in batches of 1, 2, 3, ... clips.  In place of what a clip lacks the export is given 255, or NaN.
    """
    names = student.modalities
    rows = torch.tensor([[m in subset for m in names] for subset in [*subsets(names), ()]])  # [2^M, M]
    worst = 0.0
    for start, stop in _batches(len(rows)):
        present = rows[start:stop]
        has = dict(zip(names, present.T, strict=True))
        clips = {m: noise(m, each.input_shape, stop - start, seed=start) for m, each in student.backbones.items()}
        inputs = {m: torch.from_numpy(values) for m, values in clips.items()}
        wanted = student({m: x[has[m]] for m, x in inputs.items()}, present).logits
        for m, x in inputs.items():
            x[~has[m]] = torch.nan if x.is_floating_point() else 255
        found = answer({**inputs, PRESENT: present})
        worst = max(worst, *(_difference(found.get(head), logits) for head, logits in wanted.items()))
    return Agreement(worst, len(rows))


def _batches(n: int) -> list[tuple[int, int]]:
    """Cut n rows into runs of 1, 2, 3, ...; the last one may be shorter."""
    cut, size = [(0, 1)], 2
    while cut[-1][1] < n:
        start = cut[-1][1]
        cut.append((start, min(start + size, n)))
        size += 1
    return cut


def _difference(found: Tensor | None, wanted: Tensor) -> float:
    if found is None or found.shape != wanted.shape or not found.isfinite().all():
        return inf
    return (found - wanted).abs().max().item()
