"""One self-contained HTML page about a student: the subset table, its bars, and the training curves."""

import io
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from ..data.publish import publish
from ..data.runs import RunFolder
from .results import Evaluation

matplotlib.use("svg")
from matplotlib.figure import Figure


def write_report(run: RunFolder, evaluation: Evaluation, path: Path) -> None:
    """Write one page that needs nothing else, no network either, to be read."""
    pages = Environment(loader=PackageLoader("karmma.distill", "."), autoescape=select_autoescape())
    page = pages.get_template("report.html").render(
        run=run.path.name,
        evaluation=evaluation,
        heads=list(evaluation.majority),
        best={head: max(row.accuracy[head] for row in evaluation.rows) for head in evaluation.majority},
        bars=_bars(evaluation),
        curves=_curves(run),
        settings=run.config,
        result=run.result,
    )
    publish(path, page.encode())


def _svg(figure: Figure) -> Markup:
    """Return a figure as inline SVG; the same figure gives the same bytes."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "karmma"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


def _bars(evaluation: Evaluation) -> Markup:
    """Draw action accuracy by subset, with 95 percent bounds and the majority class as a line."""
    figure = Figure(figsize=(7, 3.2))
    axes = figure.subplots()
    values = [100 * row.accuracy["action"] for row in evaluation.rows]
    below = [v - 100 * row.low["action"] for v, row in zip(values, evaluation.rows, strict=True)]
    above = [100 * row.high["action"] - v for v, row in zip(values, evaluation.rows, strict=True)]
    axes.bar([row.subset for row in evaluation.rows], values, yerr=[below, above], capsize=2, color="#3b6ea5")
    axes.axhline(100 * evaluation.majority["action"], color="#b33", linewidth=1, label="majority class")
    axes.set_ylabel("action accuracy (%)")
    axes.tick_params(axis="x", rotation=60)
    axes.legend()
    return _svg(figure)


def _curves(run: RunFolder) -> Markup:
    """Draw training loss and validation action accuracy by epoch."""
    figure = Figure(figsize=(7, 2.6))
    left, right = figure.subplots(1, 2)
    metrics = run.metrics()
    epochs = [record["epoch"] for record in metrics]
    for name in ("loss", "ce", "kl"):
        if name in metrics[0]:
            left.plot(epochs, [record[name] for record in metrics], label=name)
    left.set_xlabel("epoch")
    left.set_title("training loss")
    left.legend()
    for name in metrics[0]["val"]:
        if name != "loss":
            right.plot(epochs, [100 * record["val"][name] for record in metrics], label=name)
    right.set_xlabel("epoch")
    right.set_title("validation accuracy (%)")
    right.legend()
    return _svg(figure)
