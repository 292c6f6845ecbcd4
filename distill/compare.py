"""Several runs side by side: mean and deviation over seeds, average ranks, and rows as in the paper's Tab. 1."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.errors import RunError
from ..data.publish import publish, publish_json
from .results import ACTION, Evaluation, write_csv


@dataclass(frozen=True)
class Column:
    """Runs that differ in their seed alone.

    mean, std: subset -> head, and "action" -> accuracy, 0..1; std is that of a sample, None for one run.
    rates: of the action, missing rate -> mean and deviation, over draws for one run, else over the runs' means.
    rank: average over subsets of the dense rank by action accuracy, 1 the best; None if nothing is beside it.
    """

    label: str
    runs: tuple[str, ...]
    mean: dict[str, dict[str, float | None]]
    std: dict[str, dict[str, float | None]]
    rates: dict[float, tuple[float | None, float | None]]
    rank: float | None = None


def compare(evaluations: Sequence[Evaluation]) -> list[Column]:
    """Put evaluations of one split side by side, those of one variant together, in the order they come.

    Subsets are those that all of them have.  Raises RunError if they have none in common, or other heads.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        if {*other.majority} != {*first.majority}:
            raise RunError(
                f"{other.run} has the heads {', '.join(other.majority)}, {first.run} {', '.join(first.majority)}. "
                "Compare runs of the same heads."
            )
    shared = [row.subset for row in first.of("all")]
    shared = [subset for subset in shared if all(subset in _accuracies(each) for each in evaluations)]
    if not shared:
        names = ", ".join(each.run for each in evaluations)
        raise RunError(f"{names}: no subset of modalities in common. Compare runs that share modalities.")
    variants: dict[str, list[Evaluation]] = {}
    for each in evaluations:
        variants.setdefault(each.variant, []).append(each)
    columns = [_column(runs, shared) for runs in variants.values()]
    columns = [_told_apart(column, columns) for column in columns]
    if len(columns) == 1:
        return columns
    ranks = [dense_ranks([column.mean[subset][ACTION] for column in columns]) for subset in shared]
    averages = [statistics.fmean(each) for each in zip(*ranks, strict=True)]
    return [Column(**vars(column) | {"rank": rank}) for column, rank in zip(columns, averages, strict=True)]


def dense_ranks(accuracies: Sequence[float | None]) -> list[int]:
    """Return the rank of each accuracy, 1 the largest; ties share a rank and leave no gap after it.

    As printed, in percent with two decimals, decides what ties.  Source: Tab. B.1 and B.2.
    """
    printed = [-1.0 if value is None else round(100 * value, 2) for value in accuracies]
    places = {value: rank for rank, value in enumerate(sorted({*printed}, reverse=True), 1)}
    return [places[value] for value in printed]


def _accuracies(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    return {row.subset: dict(row.accuracy) for row in evaluation.of("all")}


def _column(runs: Sequence[Evaluation], subsets: Sequence[str]) -> Column:
    found, names = [_accuracies(run) for run in runs], list(runs[0].majority)
    cells = {subset: {name: [each[subset][name] for each in found] for name in names} for subset in subsets}
    rates = {}
    for rows in zip(*(run.rates for run in runs), strict=True):
        means = [row.mean[ACTION] for row in rows]
        rates[rows[0].rate] = (_mean(means), _std(means) if len(runs) > 1 else rows[0].std[ACTION])
    return Column(
        runs[0].label,
        tuple(run.run for run in runs),
        {subset: {name: _mean(values) for name, values in of.items()} for subset, of in cells.items()},
        {subset: {name: _std(values) for name, values in of.items()} for subset, of in cells.items()},
        rates,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _std(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) == len(values) > 1 else None


def _told_apart(column: Column, others: Sequence[Column]) -> Column:
    """Add the run's name to a label that two columns have."""
    if sum(other.label == column.label for other in others) == 1:
        return column
    return Column(**vars(column) | {"label": f"{column.label} ({column.runs[0]})"})


def write_comparison(columns: Sequence[Column], stem: Path) -> list[Path]:
    """Write `<stem>.csv`, `-rates.csv`, `.json` and `.tex`; return their paths."""
    names, rows = list(next(iter(columns[0].mean.values()))), []
    header = ["method", "runs", "average_rank", "subset", *names, *(f"{name}_std" for name in names)]
    for column in columns:
        for subset in column.mean:
            values = [_number(part[subset][name], 4) for part in (column.mean, column.std) for name in names]
            rows.append([column.label, " ".join(column.runs), _number(column.rank, 2), subset, *values])
    paths = [stem.with_name(f"{stem.name}{kind}") for kind in (".csv", "-rates.csv", ".json", ".tex")]
    write_csv(paths[0], header, rows)
    rates = [[c.label, rate, *(_number(each, 4) for each in found)] for c in columns for rate, found in c.rates.items()]
    write_csv(paths[1], ["method", "rate", "action", "action_std"], rates)
    publish_json(paths[2], [vars(column) for column in columns])
    publish(paths[3], latex(columns).encode())
    return paths


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def latex(columns: Sequence[Column]) -> str:
    r"""Return the rows of a table method & modalities & action accuracy in percent, grouped as in Tab. 1.

    The best of a subset is bold, the second best underlined, as printed; wants booktabs for \midrule.
    """
    parts = []
    for subset in columns[0].mean:
        cells = [(column.mean[subset][ACTION], column.std[subset][ACTION]) for column in columns]
        ranks = dense_ranks([mean for mean, _ in cells])
        rows = []
        for at, (column, (mean, std), rank) in enumerate(zip(columns, cells, ranks, strict=True)):
            shown = "--" if mean is None else f"{100 * mean:.2f}"
            if len(columns) > 1 and rank < 3:
                shown = rf"\textbf{{{shown}}}" if rank == 1 else rf"\underline{{{shown}}}"
            spread = "" if std is None or math.isnan(std) else rf" $\pm$ {100 * std:.2f}"
            named = subset if at == (len(columns) - 1) // 2 else ""
            rows.append(rf"{_latex(column.label)} & {named} & {shown}{spread} \\")
        parts.append("\n".join(rows))
    return "% method & modalities & action accuracy (%)\n" + "\n\\midrule\n".join(parts) + "\n"


def _latex(label: str) -> str:
    known = re.sub(r"KARMMA_([A-Z+]+)", r"KARMMA<\1>", label).replace("w/ delta", "w/ <delta>")
    text = re.sub(r"([#$%&_{}])", r"\\\1", known)
    return re.sub(r"<([A-Z+]+)>", r"\\textsubscript{\1}", text).replace("<delta>", r"$\delta$")
