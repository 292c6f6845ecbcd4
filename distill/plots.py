"""Figures of a report, as SVG: accuracy by subset, missing rates, training curves, hardest classes."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..fuse.figures import as_text, svg
from .compare import Column
from .results import ACTION, ClassRow, Evaluation, SubsetRow

WIDTH = 5.4  # inches: letters stay large enough on a phone


def subset_bars(evaluations: Sequence[Evaluation]) -> str:
    """Draw action accuracy by subset, runs side by side, with 95 percent bounds and the commonest action as a line."""
    bars = {
        each.run: {row.subset: bounded for row in each.of("all") if (bounded := _bounded(row))} for each in evaluations
    }
    names = list(dict.fromkeys(row.subset for each in evaluations for row in each.of("all")))
    return _bars(names, bars, evaluations[0].majority[ACTION] or 0)


def _bounded(row: SubsetRow) -> tuple[float, ...]:
    """Return the accuracy of the action and its bounds; nothing where no clip counts."""
    return tuple(each for part in (row.accuracy, row.low, row.high) if (each := part[ACTION]) is not None)


def column_bars(columns: Sequence[Column], majority: float) -> str:
    """Draw action accuracy by subset, models side by side, with deviations over runs.

    majority: accuracy of always naming the commonest action, drawn as a line.
    """
    bars = {}
    for column in columns:
        found = {name: (column.mean[name][ACTION], column.std[name][ACTION] or 0) for name in column.mean}
        bars[column.label] = {
            name: (mean, mean - std, mean + std) for name, (mean, std) in found.items() if mean is not None
        }
    return _bars(list(columns[0].mean), bars, majority)


def _bars(names: Sequence[str], bars: Mapping[str, Mapping[str, tuple[float, ...]]], majority: float) -> str:
    """Draw bars by subset; bars: label -> subset -> accuracy, and the lower and upper end of its whisker, 0..1."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(bars)
    for at, (label, found) in enumerate(bars.items()):
        values = [100 * value for value, _, _ in found.values()]
        below = [max(value - 100 * low, 0) for value, (_, low, _) in zip(values, found.values(), strict=True)]
        above = [max(100 * high - value, 0) for value, (_, _, high) in zip(values, found.values(), strict=True)]
        places = [names.index(name) + (at - (len(bars) - 1) / 2) * width for name in found]
        thin = {"linewidth": 0.8}
        axes.bar(places, values, width, yerr=[below, above], label=as_text(label), capsize=2, error_kw=thin)
    axes.axhline(100 * majority, color="#b33", linewidth=1, label="commonest action")
    axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 7 else 0)
    axes.set_ylabel("action accuracy (%)")
    _legend(figure, axes)
    return svg(figure)


def rate_curves(columns: Sequence[Column]) -> str:
    """Draw action accuracy over the rate at which modalities are missing (Fig. 4), with deviations as bands."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    for column in columns:
        rates = [100 * rate for rate in column.rates]
        means, spreads = zip(
            *((100 * (mean or 0), 100 * (std or 0)) for mean, std in column.rates.values()), strict=True
        )
        (line,) = axes.plot(rates, means, "o-", markersize=3, label=as_text(column.label))
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(rates, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="modalities missing (%)", ylabel="action accuracy (%)")
    _legend(figure, axes)
    return svg(figure)


def training_curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Draw loss and its parts, and validation accuracy, by epoch; records: lines of metrics.jsonl."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in records]
    for name in ("loss", "ce", "kl", "info_nce"):
        if name in records[0]:
            left.plot(epochs, [record[name] for record in records], label=as_text(name))
    for name in records[0]["val"]:
        if name != "loss":
            values = [record["val"][name] for record in records]
            right.plot(epochs, [None if value is None else 100 * value for value in values], label=name)
    left.set(xlabel="epoch", title="training loss")
    right.set(xlabel="epoch", title="validation accuracy (%)")
    left.legend()
    right.legend()
    return svg(figure)


def class_bars(rows: Sequence[ClassRow], subset: str) -> str:
    """Draw the accuracy of some classes of one head under a subset, one bar a class with its number of clips."""
    figure = Figure(figsize=(WIDTH, 0.6 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [as_text(f"{row.name} ({row.n_clips})") for row in rows]
    axes.barh(range(len(rows)), [100 * (row.accuracy[subset] or 0) for row in rows])
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="accuracy (%)")
    return svg(figure)


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")
