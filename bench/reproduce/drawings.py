"""Plots of the reproduction that a report does not have."""

from collections.abc import Mapping, Sequence
from typing import Any

from karmma.distill.plots import WIDTH
from karmma.fuse.figures import svg
from matplotlib.figure import Figure


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
