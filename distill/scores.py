"""What predictions are worth: accuracy, top-5 and calibration by subset and group, missing rates, classes."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from ..data.annotations import ClipTable
from ..data.config import digest
from ..data.errors import TableError
from ..data.modality import letters
from ..data.publish import plain
from ..data.runs import RunFolder
from ..fuse.dropout import modality_dropout
from ..fuse.metrics import ACTION, calibration_error, confidence, majority, predictions, topk_hits, wilson_bounds
from .groups import groups
from .results import DRAWS, Asked, ClassRow, Evaluation, RateRow, SubsetRow
from .subsets import Predictions, Subset
from .variants import label, variant

RATES = tuple(tenth / 10 for tenth in range(10))  # Fig. 4: 0 to 90 percent
N_CONFUSED = 20  # pairs of classes that are named
Hits = Mapping[Subset, Mapping[str, Tensor]]  # subset -> head, and "action" -> [n] bool


def labels_of(run: RunFolder, table: ClipTable, rows: np.ndarray) -> dict[str, Tensor]:
    """Return head -> [n] class indices of table rows, as the run counts classes; -1 = unlabelled.

    Raises TableError for a label that the run does not know.
    """
    some = np.zeros(table.n_clips, bool)
    some[rows] = True
    # Labels of other clips need not be known.
    part, order = table.kept(some), np.argsort(np.argsort(rows))
    classes = run.config["classes"].items()
    return {head: torch.from_numpy(part.labels(head, tuple(names))[order]) for head, names in classes}


def judge(
    run: RunFolder, table: ClipTable, found: Predictions, asked: Asked, made_from: str
) -> tuple[Evaluation, dict[str, np.ndarray]]:
    """Return what predictions are worth, and `confusion`; labels come from the table as it is now.

    Raises TableError if no clip is labelled in any head, or one has a label that the run does not know.
    """
    described, labels = run.config, labels_of(run, table, found.rows)
    counted = groups(table, found.rows, labels)
    if not any(clips.any() for clips in counted["all"].values()):
        raise TableError(
            f"{table.path}: no clip of split {asked.split!r} is labelled in {', '.join(labels)}. Choose another with "
            "--split; --challenge writes predictions of unlabelled clips."
        )
    hits = {subset: topk_hits(logits, labels) for subset, logits in found.logits.items()}
    by_subset = [_rows(subset, found, labels, hits[subset], counted) for subset in found.logits]
    rows = [row for of_group in zip(*by_subset, strict=True) for row in of_group]
    matrices, draws = confusion(found, labels), asked.draws or DRAWS
    evaluation = Evaluation(
        run=run.path.name,
        label=label(described),
        variant=variant(described),
        split=asked.split,
        views=asked.views,
        draws=draws,
        clips=digest(table.clip_ids[found.rows].tolist()),
        majority=plain(majority(labels)),
        rows=tuple(rows),
        rates=tuple(_rates(found, hits, counted["all"], draws)),
        classes=tuple(row for head in labels for row in _classes(head, described["classes"][head], labels[head], hits)),
        confused={head: _confused(described["classes"][head], matrix) for head, matrix in matrices.items()},
        failed=found.failed,
        made_from=made_from,
    )
    return evaluation, matrices


def _rows(
    subset: Subset,
    found: Predictions,
    labels: Mapping[str, Tensor],
    hit: Mapping[str, Tensor],
    counted: Mapping[str, Mapping[str, Tensor]],
) -> Iterator[SubsetRow]:
    """Yield what one subset reaches on each group of clips."""
    logits, columns = found.logits[subset], [found.modalities.index(modality) for modality in subset]
    here = torch.from_numpy(found.present[:, columns].all(axis=1))
    top5, sure = topk_hits(logits, labels, 5), confidence(logits)
    for group, clips in counted.items():
        bounds = {name: wilson_bounds(int((hit[name] & of).sum()), int(of.sum())) for name, of in clips.items()}
        yield SubsetRow(
            group,
            letters(subset),
            int(clips[ACTION].sum()),
            int((clips[ACTION] & here).sum()),
            {name: _share(hit[name], of) for name, of in clips.items()},
            {name: low for name, (low, _) in bounds.items()},
            {name: high for name, (_, high) in bounds.items()},
            {name: _share(top5[name], of) for name, of in clips.items()},
            plain({name: calibration_error(sure[name][of], hit[name][of]) for name, of in clips.items()}),
        )


def _rates(found: Predictions, hits: Hits, clips: Mapping[str, Tensor], draws: int) -> Iterator[RateRow]:
    """Yield accuracy where modalities of each clip are missing at random, by the rule of modality dropout.

    What is left of a clip is one of the subsets that were predicted, so nothing is run again.
    """
    present = torch.from_numpy(found.present)
    some = present.any(1)  # a clip that has nothing is judged as it is
    bits = 2 ** torch.arange(present.shape[1])
    place = torch.zeros(2 ** len(bits), dtype=torch.long)  # of a subset, told by the sum of its bits
    for at, subset in enumerate(found.logits):
        place[sum(2 ** found.modalities.index(modality) for modality in subset)] = at
    stacked = {name: torch.stack([each[name] for each in hits.values()]) for name in clips}  # each [subsets, n]
    for rate in RATES:
        values = torch.empty(len(clips), draws, dtype=torch.float64)
        for draw in range(draws):
            left = torch.ones_like(present)
            left[some] = modality_dropout(present[some], rate, Generator().manual_seed(draw))
            chosen = place[(left * bits).sum(1)]
            for own, (name, of) in zip(values, clips.items(), strict=True):
                own[draw] = stacked[name][chosen, torch.arange(len(chosen))][of].double().mean()
        std = values.std(1) if draws > 1 else torch.full((len(clips),), torch.nan)
        mean, spread = (plain(dict(zip(clips, each.tolist(), strict=True))) for each in (values.mean(1), std))
        yield RateRow(rate, mean, spread)


def _classes(head: str, names: Sequence[str], labels: Tensor, hits: Hits) -> Iterator[ClassRow]:
    for index, name in enumerate(names):
        of = labels == index
        yield ClassRow(head, name, int(of.sum()), {letters(s): _share(hit[head], of) for s, hit in hits.items()})


def confusion(found: Predictions, labels: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return head -> [N_h, N_h] labelled clips by true and predicted class, all modalities in; labels: head -> [n]."""
    out, logits = {}, found.logits[found.modalities]
    for head, classes in predictions(logits).items():
        n, of = logits[head].shape[1], labels[head] >= 0
        out[head] = torch.bincount(labels[head][of] * n + classes[of], minlength=n * n).view(n, n).numpy()
    return out


def _confused(names: Sequence[str], matrix: np.ndarray) -> list[tuple[str, str, int]]:
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:N_CONFUSED]
    pairs = [divmod(int(at), len(names)) for at in order]
    return [(names[true], names[said], int(wrong[true, said])) for true, said in pairs if wrong[true, said]]


def _share(hit: Tensor, of: Tensor) -> float | None:
    return (hit & of).sum().item() / of.sum().item() if of.any() else None
