"""One self-contained HTML page about one run or several: results, curves, classes, example clips, settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from ..data.modality import letters
from ..data.publish import publish
from ..data.runs import RunFolder
from .compare import compare
from .efficiency import Efficiency
from .efficiency_report import efficiency_bars
from .examples import Example
from .plots import class_bars, rate_curves, subset_bars, training_curves
from .results import ClassRow, Evaluation
from .variants import run_modalities

N_HARDEST, FEWEST = 8, 3  # classes that are shown of a head, and the clips that one must have for it


@dataclass(frozen=True)
class Reported:
    """A run on a page.  cost: None where it is not known.  examples: may be empty."""

    run: RunFolder
    evaluation: Evaluation
    cost: Efficiency | None
    examples: Sequence[Example]

    @property
    def facts(self) -> dict[str, str]:
        """What a reader asks first, by name."""
        described, result, row = self.run.config, self.run.result, self.evaluation.of("all")[0]
        accuracy = row.accuracy["action"]
        said = {
            f"action accuracy, {self.evaluation.split}": "-" if accuracy is None else f"{100 * accuracy:.1f} %",
            "clips": str(row.n_clips),
            "modalities": letters(run_modalities(described)),
            "trained parameters": f"{result['parameters'] / 1e6:.2f} M",
            "best epoch": f"{result['epoch']}",
        }
        if self.cost is not None:
            said["GFLOPs a clip"] = f"{self.cost.rows[0].gflops:.1f}"
        return said | ({"teacher": described["teacher"]} if "teacher" in described else {})

    @property
    def hardest(self) -> dict[str, list[ClassRow]]:
        """By head, the classes that are recognised worst with all modalities; those with few clips do not count."""
        subset = self.evaluation.of("all")[0].subset
        out: dict[str, list[ClassRow]] = {}
        for row in self.evaluation.classes:
            if row.n_clips >= FEWEST:
                out.setdefault(row.head, []).append(row)
        return {head: sorted(rows, key=lambda row: row.accuracy[subset] or 0)[:N_HARDEST] for head, rows in out.items()}

    @property
    def identities(self) -> dict[str, Any]:
        """All that decides the run, but for its settings and classes, which stand apart."""
        return {k: v for k, v in self.run.config.items() if k not in ("settings", "data", "classes", "kind")}


def write_report(reported: Sequence[Reported], path: Path) -> None:
    """Write one page that needs nothing else, no network either, to be read."""
    evaluations = [each.evaluation for each in reported]
    columns, costs = compare(evaluations), [each.cost for each in reported if each.cost is not None]
    best = {}
    for subset in columns[0].mean:
        accuracies = [column.mean[subset]["action"] for column in columns]
        best[subset] = max((value for value in accuracies if value is not None), default=None)
    first = evaluations[0]
    pages = Environment(loader=PackageLoader("karmma.distill", "."), autoescape=select_autoescape(), trim_blocks=True)
    page = pages.get_template("report.html").render(
        reported=reported,
        title=", ".join(column.label for column in columns),
        columns=columns,
        best=best,
        heads=list(first.majority),
        majority=first.majority,
        best_of={name: max(_numbers(first, name), default=None) for name in first.majority},
        bars=Markup(subset_bars(evaluations)),
        rates=Markup(rate_curves(columns)),
        costs=Markup(efficiency_bars(costs)) if costs else "",
        curves=[Markup(training_curves(each.run.metrics())) for each in reported],
        hardest=[_hardest(each) for each in reported],
    )
    publish(path, page.encode())


def _numbers(evaluation: Evaluation, name: str) -> list[float]:
    return [value for row in evaluation.of("all") if (value := row.accuracy[name]) is not None]


def _hardest(each: Reported) -> dict[str, Markup]:
    subset = each.evaluation.of("all")[0].subset
    return {head: Markup(class_bars(rows, subset)) for head, rows in each.hardest.items()}
