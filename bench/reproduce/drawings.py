"""Plots of the reproduction that a report does not have."""

from collections.abc import Mapping, Sequence
from typing import Any

from karmma.distill.compare import Column
from karmma.distill.plots import WIDTH
from karmma.distill.results import ACTION
from karmma.fuse.figures import as_text, svg
from matplotlib.figure import Figure


def subset_bars(columns: Sequence[Column], majority: float) -> str:
    """Draw action accuracy by subset, models side by side, with deviations over seeds and the commonest action."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes, width, names = figure.subplots(), 0.8 / len(columns), list(columns[0].mean)
    for at, column in enumerate(columns):
        values = [100 * column.mean[name][ACTION] for name in names]
        spreads = [100 * (column.std[name][ACTION] or 0) for name in names]
        places = [place + (at - (len(columns) - 1) / 2) * width for place in range(len(names))]
        thin = {"capsize": 2, "error_kw": {"linewidth": 0.8}}
        axes.bar(places, values, width, yerr=spreads, label=as_text(column.label), **thin)
    axes.axhline(100 * majority, color="#b33", linewidth=1, label="commonest action")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("action accuracy (%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")
    return svg(figure)


def theta_curve(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw accuracy of the teacher over the memory that its training took, a point for each Theta."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        value, (low, high) = 100 * row["accuracy"], (100 * bound for bound in row["bounds"])
        gigabytes = row["bytes"] / 2**30
        axes.errorbar(gigabytes, value, yerr=[[value - low], [high - value]], fmt="o", markersize=4, capsize=2)
        axes.annotate(f"Theta {row['theta']}", (gigabytes, value), xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel="memory in training (GiB)", ylabel="action accuracy of V+A (%)")
    axes.margins(x=0.15)
    return svg(figure)
