"""What a sweep leaves to look at: its trials as a table and a plot."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from ..data.publish import publish
from .figures import svg
from .space import Dimension, Space

COLUMNS = 3


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials, the best first, those that did not come to their end last."""
    return sorted(trials, key=lambda trial: (not is_complete(trial), -(trial.value or 0.0), trial.number))


def is_complete(trial: FrozenTrial) -> bool:
    """Say whether a trial came to its end; of one that was ended early `value` is what it had last."""
    return trial.state == TrialState.COMPLETE


def write_results(folder: Path, space: Space, trials: Sequence[FrozenTrial]) -> list[Path]:
    """Write trials.csv and trials.svg; return their paths."""
    paths = [folder / "trials.csv", folder / "trials.svg"]
    text = io.StringIO()
    fields = [dimension.field for dimension in space.dimensions]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "value", "epochs", *fields, "reason"])
    for trial in ranked(trials):
        chosen = [trial.params.get(field, "") for field in fields]
        value = "" if trial.value is None else trial.value
        reason = trial.user_attrs.get("reason", "")
        writer.writerow([trial.number, trial.state.name.lower(), value, n_epochs(trial), *chosen, reason])
    publish(paths[0], text.getvalue().encode())
    publish(paths[1], _plot(space, trials).encode())
    return paths


def _reached(trial: FrozenTrial) -> float:
    assert trial.value is not None  # Optuna completes no trial without one
    return trial.value


def n_epochs(trial: FrozenTrial) -> int:
    """Return how many epochs a trial was trained."""
    return len(trial.intermediate_values)


def _plot(space: Space, trials: Sequence[FrozenTrial]) -> str:
    """Draw the value of each complete trial by number with the best so far, and by each option; return SVG."""
    done = [trial for trial in trials if is_complete(trial)]
    panels = 1 + len(space.dimensions)
    rows, columns = -(-panels // COLUMNS), min(panels, COLUMNS)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    first, *others = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    numbers, values = [trial.number for trial in done], [_reached(trial) for trial in done]
    first.plot(numbers, values, "o", markersize=4)
    first.step(numbers, [max(values[: at + 1]) for at in range(len(values))], where="post", label="best so far")
    ended = [trial for trial in trials if trial.state == TrialState.PRUNED and trial.value is not None]
    first.plot([trial.number for trial in ended], [trial.value for trial in ended], "x", label="ended early")
    first.set(xlabel="trial", ylabel="value (action accuracy)")
    first.legend(fontsize="small")
    for axes, dimension in zip(others, space.dimensions, strict=False):
        _by_option(axes, dimension, done)
    for unused in others[len(space.dimensions) :]:
        unused.remove()
    return svg(figure)


def _by_option(axes: Axes, dimension: Dimension, done: Sequence[FrozenTrial]) -> None:
    found = [trial.params[dimension.field] for trial in done]
    places = [dimension.choices.index(value) for value in found] if dimension.choices else found
    axes.plot(places, [_reached(trial) for trial in done], "o", markersize=4)
    axes.set_xlabel(dimension.field)
    if dimension.choices:
        axes.set_xticks(range(len(dimension.choices)), dimension.choices)
    elif dimension.log:
        axes.set_xscale("log")
