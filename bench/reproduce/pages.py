"""docs/reproduction.md: its tables and plots, made anew from the results that were kept; the words stay as they are."""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from claims import STUDENT, claims
from drawings import theta_curve
from karmma.data.publish import publish, read_json
from karmma.distill.compare import Column, compare
from karmma.distill.efficiency import Cost, Efficiency
from karmma.distill.efficiency_report import efficiency_bars
from karmma.distill.plots import column_bars, rate_curves
from karmma.distill.results import ACTION, Evaluation
from karmma.distill.variants import DELTA
from plan import SETS, STRATEGIES, TEMPERATURE, VARIANTS

Results = Mapping[str, dict[str, Any]]  # step -> what was kept of it
PAGE = "reproduction.md"
BLOCK = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def write_pages(results: Path, docs: Path) -> None:
    """Fill in the tables of docs/reproduction.md, and draw its plots, from results/<set>/<step>.json.

    A folder without the page gets a bare one, with all tables.
    """
    page = docs / PAGE
    text = page.read_text(encoding="utf-8") if page.exists() else _bare()
    blocks: dict[str, str] = {}
    for name in SETS:
        found = {path.stem: read_json(path) for path in sorted((results / name).glob("*.json"))}
        blocks |= {f"{kind}-{name}": made for kind, made in tables(found).items()}
        for kind, drawn in drawings(found).items():
            publish(docs / "reproduction" / f"{kind}-{name}.svg", drawn.encode())
    filled = BLOCK.sub(lambda match: f"{match[1]}{blocks.get(match[2], '')}{match[3]}", text)
    publish(page, filled.encode())


def _bare() -> str:
    parts = [f"<!-- begin {kind}-{name} -->\n<!-- end {kind}-{name} -->\n" for name in SETS for kind in TABLES]
    return "# Reproduction\n\n" + "\n".join(parts)


def tables(found: Results) -> dict[str, str]:
    """Return the tables of one data set as Markdown, by kind; one whose results are not there yet says so."""
    return {kind: _tried(make, found) for kind, make in TABLES.items()}


def drawings(found: Results) -> dict[str, str]:
    """Return the plots of one data set as SVG, by kind; none of what is not there yet."""
    drawn: dict[str, str] = {}
    columns = main_columns(found)
    if columns:
        drawn |= {"rates": rate_curves(columns), "subsets": column_bars(columns, chance(found))}
    if "efficiency" in found:
        drawn["efficiency"] = efficiency_bars(costs(found))
    thetas = theta_rows(found)
    if thetas:
        drawn["theta"] = theta_curve(thetas)
    return drawn


def _tried(make: Callable[[Results], str], found: Results) -> str:
    try:
        return make(found) or "Not finished yet.\n"
    except KeyError as missing:
        return f"Not finished yet: {missing.args[0]}.\n"


def evaluations(found: Results, steps: Sequence[str]) -> list[Evaluation]:
    """Return the evaluations on test of some steps."""
    return [Evaluation.parsed(found[step]["evaluation"]) for step in steps]


def main_steps(found: Results) -> list[str]:
    """Return the steps of the four students of Tab. 1, those that are there."""
    return [step for variant in VARIANTS for step in sorted(found) if step.startswith(f"{variant}-")]


def main_columns(found: Results) -> list[Column]:
    """Return the four students of Tab. 1, each over its seeds."""
    steps = main_steps(found)
    return compare(evaluations(found, steps)) if steps else []


def chance(found: Results) -> float:
    """Return the accuracy of always naming the commonest action of the test split."""
    return next(kept["evaluation"]["majority"][ACTION] for kept in found.values() if "evaluation" in kept)


def costs(found: Results) -> list[Efficiency]:
    """Return what teacher and student cost."""
    models = [
        Efficiency(**kept | {"rows": tuple(Cost(**row) for row in kept["rows"])})
        for kept in found["efficiency"]["models"]
    ]
    names = ("teacher", "student")
    return [Efficiency(**vars(model) | {"name": name}) for name, model in zip(names, models, strict=True)]


def _subsets(found: Results) -> str:
    """Tab. 1: accuracy by subset, mean and deviation over seeds; the teacher beside them."""
    columns = main_columns(found)
    if not columns:
        return ""
    (teacher,) = compare(evaluations(found, ["teacher"])) if "teacher" in found else (None,)
    rows = [_row(column) for column in columns] + ([_row(teacher)] if teacher else [])
    commonest = [percent(chance(found))] * (len(columns[0].mean) + 1)
    rows += [["commonest action", "", *commonest, ""]]
    return table(["", "runs", *columns[0].mean, "mean", "average rank"], rows)


def _row(column: Column) -> list[str]:
    cells = [percent(column.mean[subset][ACTION], column.std[subset][ACTION]) for subset in column.mean]
    mean = statistics.fmean(column.mean[subset][ACTION] for subset in column.mean)
    rank = "" if column.rank is None else f"{column.rank:.2f}"
    return [column.label, str(len(column.runs)), *cells, f"{100 * mean:.1f}", rank]


def _rates(found: Results) -> str:
    """Fig. 4 as numbers."""
    columns = main_columns(found)
    if not columns:
        return ""
    rates = list(columns[0].rates)
    rows = []
    for column in columns:  # the deviation of a single run is over draws, not seeds
        found_here = [column.rates[rate] if len(column.runs) > 1 else column.rates[rate][:1] for rate in rates]
        rows.append([column.label, *(percent(*one) for one in found_here)])
    return table(["missing", *(f"{100 * rate:.0f} %" for rate in rates)], rows)


def _strategies(found: Results) -> str:
    """Tab. B.1 at one seed: what stands in for a missing modality, without teacher."""
    steps = [step for step in ("baseline-0", "dropout-0", *(f"{s}-0" for s in STRATEGIES), "delta-0") if step in found]
    columns = compare(evaluations(found, steps)) if steps else []
    return table(["", "runs", *columns[0].mean, "mean", "average rank"], [_row(c) for c in columns]) if columns else ""


def theta_rows(found: Results) -> list[dict[str, Any]]:
    """Return Theta, accuracy of the teacher of V and A, its GFLOPs, memory and minutes, the most tokens first."""
    rows = []
    for step in (step for step in found if step.startswith("theta-")):
        theta, kept = step.removeprefix("theta-"), found[step]
        (both,) = (row for row in evaluations(found, [step])[0].of("all") if row.subset == "V+A")
        by_theta = found["efficiency"]["models"][0]["by_theta"] if "efficiency" in found else {}
        rows.append(
            {
                "theta": theta,
                "accuracy": both.accuracy[ACTION],
                "bounds": (both.low[ACTION], both.high[ACTION]),
                "gflops": by_theta.get(theta, {}).get("V+A"),
                "bytes": kept["peak_bytes"],
                "minutes": _minutes([kept]),
            }
        )
    return sorted(rows, key=lambda row: -1e9 if row["theta"] == "none" else -int(row["theta"]))


def _theta(found: Results) -> str:
    """Tab. 4: the teacher of V and A under several Theta."""
    rows = [
        [
            row["theta"],
            f"{100 * row['accuracy']:.1f} ({100 * row['bounds'][0]:.1f} to {100 * row['bounds'][1]:.1f})",
            "" if row["gflops"] is None else f"{row['gflops']:.2f}",
            f"{row['bytes'] / 2**30:.2f}",
            row["minutes"],
        ]
        for row in theta_rows(found)
    ]
    header = ["Theta", "action accuracy of V+A (%, 95 percent bounds)", "GFLOPs", "memory in training (GiB)", "minutes"]
    return table(header, rows) if rows else ""


def _efficiency(found: Results) -> str:
    """Fig. 5 as numbers."""
    teacher, student = costs(found)
    rows = []
    for ours, theirs in zip(student.rows, teacher.rows, strict=True):
        latency = [f"{1000 * model.seconds:.0f}" for model in (theirs, ours)]
        memory = [f"{model.peak_bytes / 2**20:.0f}" for model in (theirs, ours)]
        share = f"{100 * ours.gflops / theirs.gflops:.1f} %"
        rows.append([ours.subset, f"{theirs.gflops:.3f}", f"{ours.gflops:.3f}", share, *latency, *memory])
    header = [
        "",
        "GFLOPs, teacher",
        "student",
        "of it",
        "latency (ms), teacher",
        "student",
        "memory (MiB), teacher",
        "student",
    ]
    sizes = f"Parameters: teacher {teacher.frozen / 1e6:.2f} M frozen and {teacher.trained / 1e6:.2f} M trained, "
    return f"{sizes}student {student.trained / 1e6:.2f} M.\n\n{table(header, rows)}"


def _times(found: Results) -> str:
    """Return what every stage took, and what the cache saved a sweep."""
    kinds = {
        "extract, all clips and views": ["extract"],
        "sweep": ["sweep"],
        "the teacher": ["teacher"],
        "teachers of the Theta ablation": [step for step in found if step.startswith("theta-")],
        "first weights of the student's backbones": [step for step in found if step.startswith(("start-", "tokens-"))],
        "students": [step for step in found if step.rpartition("-")[0] in (*VARIANTS, *STRATEGIES, "soft")],
        "what was measured beside": [step for step in found if step in ("uncached", "few", "labels", "efficiency")],
    }
    rows = [
        [kind, str(len(steps)), _minutes([found[step] for step in steps])] for kind, steps in kinds.items() if steps
    ]
    return table(["stage", "runs", "minutes, added up"], rows) + "\n" + _saved(found)


def _minutes(kept: list[dict[str, Any]]) -> str:
    """Add up what steps took; of those that were stopped and continued only the last part is known."""
    return f"{_at_least(*kept)}{sum(one['seconds'] for one in kept) / 60:.1f}"


def _at_least(*kept: dict[str, Any]) -> str:
    return "at least " if any(one.get("continued") for one in kept) else ""


def _saved(found: Results) -> str:
    clips, uncached, few, sweep = (found["extract"]["clips"], *(found[step] for step in ("uncached", "few", "sweep")))
    a_clip = (uncached["seconds"] - few["seconds"]) / (uncached["clips"] - few["clips"])
    n = sweep["trials"] * sweep["epochs"] * (clips["train"] + clips["val"])
    live, cached = a_clip * n, found["extract"]["seconds"] + sweep["seconds"]
    taken = f"{sweep['trials']} teachers of {sweep['epochs']} epochs"
    at_least = _at_least(found["extract"], sweep)
    n_clips = f"{clips['train'] + clips['val']:,} clips"
    return (
        f"A sweep of {taken} took {at_least}{cached / 3600:.2f} h, extraction included. Without a cache each epoch "
        f"would run the frozen backbones on {n_clips} anew: at the {a_clip:.2f} s a clip that {uncached['clips']} "
        f"take more than {few['clips']}, so without start-up, that is **{live / 3600:.1f} h (scaled, not run)** beside "
        f"the heads themselves, {live / cached:.1f} times as long.\n"
    )


def percent(mean: float, std: float | None = None) -> str:
    """Return an accuracy in percent, with its deviation if there is one."""
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _labels(found: Results) -> str:
    """Return what the teacher says beyond the labels, and what the same student learns of it at a temperature."""
    rows = []
    for head, kept in found["labels"]["heads"].items():
        shares = [f"{percent(kept[name])} %" for name in ("accuracy", "first")]
        rows.append([head, *shares, f"{kept['entropy']:.3f}", f"{math.log(kept['classes']):.2f}"])
    header = ["head", "accuracy on training clips", "probability of its first class", "entropy (nats)", "of at most"]
    text = table(header, rows)
    steps = {
        "delta-0": DELTA,
        "karmma-0": f"{STUDENT}, temperature 1",
        "soft-0": f"{STUDENT}, temperature {TEMPERATURE}",
    }
    if {*steps} <= {*found}:
        columns = compare(evaluations(found, list(steps)))
        named = [[label, *_row(column)[2:-1]] for column, label in zip(columns, steps.values(), strict=True)]
        text += "\n" + table(["one seed", *columns[0].mean, "mean"], named)
    return text


def _claims(found: Results) -> str:
    columns = {column.label: column for column in main_columns(found)}
    means: dict[str, list[float]] = {}
    for run in evaluations(found, main_steps(found)):
        means.setdefault(run.label, []).append(statistics.fmean(row.accuracy[ACTION] for row in run.of("all")))
    if any(len(runs) == 1 for runs in means.values()):  # without a deviation nothing is shown
        return ""
    rows = claims(columns, means, costs(found) if "efficiency" in found else [])
    return table(["expected", "found, ± standard error", ""], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "claims": _claims,
    "subsets": _subsets,
    "rates": _rates,
    "strategies": _strategies,
    "labels": _labels,
    "theta": _theta,
    "efficiency": _efficiency,
    "times": _times,
}
