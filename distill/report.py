"""One self-contained HTML page about a student: the subset table, its bars, and the training curves."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from ..data.publish import publish, publish_json
from ..data.runs import RunFolder
from ..fuse.figures import svg
from .efficiency import Cost, Efficiency
from .results import Evaluation


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


def write_efficiency(found: Sequence[Efficiency], folder: Path) -> list[Path]:
    """Write what models cost as efficiency.json, .csv and .svg; return the three paths."""
    paths = [folder / f"efficiency.{kind}" for kind in ("json", "csv", "svg")]
    publish_json(paths[0], [asdict(model) for model in found])
    text = io.StringIO()
    rows = [{"model": model.name, **asdict(row)} for model in found for row in model.rows]
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    publish(paths[1], text.getvalue().encode())
    publish(paths[2], _efficiency_bars(found).encode())
    return paths


def _efficiency_bars(found: Sequence[Efficiency]) -> Markup:
    """Draw memory, latency and GFLOPs by subset, models side by side: the paper's Fig. 5, and latency."""
    values: dict[str, Callable[[Cost], float | None]] = {
        "memory (MiB)": lambda row: row.peak_bytes and row.peak_bytes / 2**20,
        "latency (s)": lambda row: row.seconds,
        "GFLOPs": lambda row: row.gflops,
    }
    shown = {name: of for name, of in values.items() if any(of(row) for model in found for row in model.rows)}
    figure = Figure(figsize=(7, 2.2 * len(shown)), layout="constrained")
    names = list(dict.fromkeys(row.subset for model in found for row in model.rows))
    width = 0.8 / len(found)
    for axes, (label, of) in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown.items(), strict=True):
        for at, model in enumerate(found):
            places = [names.index(row.subset) + (at - (len(found) - 1) / 2) * width for row in model.rows]
            axes.bar(places, [of(row) or 0 for row in model.rows], width, label=model.name)
        axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 7 else 0)
        axes.set_ylabel(label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(found))
    return _svg(figure)


def _svg(figure: Figure) -> Markup:
    """Return a figure as SVG that templates leave as it is."""
    return Markup(svg(figure))


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
