"""`karmma evaluate`: how good a run is for every subset of its modalities, and several runs side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .cli_options import (
    SOME_FAILED,
    Answer,
    Settings,
    chosen_runs,
    out,
    run_table,
    tell,
    tell_some,
    with_options,
    would,
)
from .data.errors import ConfigError
from .data.runs import RunFolder
from .distill.results import ACTION, Asked, Evaluation
from .distill.stage import Evaluated, evaluated_before, evaluation_files, submit
from .distill.stage import evaluate as evaluate_run

if TYPE_CHECKING:
    from .distill.compare import Column


@with_options("data.table", "data.runs", "data.cache", "data.flow_weights")
def evaluate(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN", help="run folders (default: the latest student)")
    ] = None,
    *,
    settings: Settings,
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    views: Annotated[int, typer.Option(min=1, help="views of a clip that are averaged, the clean one first")] = 1,
    draws: Annotated[int, typer.Option(min=1, help="how often modalities are left out at random, for each rate")] = 5,
    challenge: Annotated[
        Path | None, typer.Option(help="only write a submission to EPIC-KITCHENS' challenge, .json or .zip")
    ] = None,
    sls: Annotated[str, typer.Option(help="the challenge's levels of pretraining, labels and training data")] = "2,3,3",
    readers: Annotated[int, typer.Option(min=1, help="processes that read clips")] = 2,
    device: Annotated[str, typer.Option(help="torch device")] = "auto",
) -> Answer:
    """Print accuracy by head and action for every subset of modalities; write CSV, JSON and LaTeX.

    Also: splits of participants and rare classes, calibration, missing rates, classes and their confusion.
    Several runs stand side by side; those that differ in their seed alone are averaged.

    \b
    Examples:
      karmma evaluate
      karmma evaluate runs/student-* --split val
      karmma evaluate runs/student-1a2b3c4d --challenge submission.zip
    """
    runs = chosen_runs(settings, folders or [])
    asked = Asked(split, views, draws, readers, device, settings.data.flow_weights)
    if challenge is not None and len(runs) > 1:
        raise typer.BadParameter("A submission is of one run: name one, or leave out --challenge.")
    if settings.dry_run:
        return _would(settings, runs, asked, challenge)
    if challenge is not None:
        failed = submit(runs[0], run_table(settings, runs[0]), settings.data.cache, asked, challenge, _levels(sls))
        _tell_failures(failed)
        tell(f"Wrote {challenge}. Next: hand it in where the challenge is held.")
        return Answer({"files": [challenge], "failed": failed}, SOME_FAILED if failed else 0)
    return _evaluated(settings, runs, asked)


def _evaluated(settings: Settings, runs: list[RunFolder], asked: Asked) -> Answer:
    """Evaluate runs and show them, side by side if there are several."""
    found = [evaluate_run(run, run_table(settings, run), settings.data.cache, asked) for run in runs]
    if len(found) == 1:
        _show(found[0])
    else:
        _show_together(found, settings.data.runs / f"comparison-{asked.stem}")
    failed = {clip_id: reason for each in found for clip_id, reason in each.evaluation.failed.items()}
    _tell_failures(failed)
    tell("Results: " + ", ".join(str(path) for each in found for path in each.files))
    tell(f"Next: karmma report {' '.join(str(run.path) for run in runs)}")
    said = [{"run": run.path, **vars(each)} for run, each in zip(runs, found, strict=True)]
    return Answer({"runs": said}, SOME_FAILED if failed else 0)


def _tell_failures(failed: dict[str, str]) -> None:
    tell_some([f"failed: {clip_id}: {reason}" for clip_id, reason in failed.items()])


def _would(settings: Settings, runs: list[RunFolder], asked: Asked, challenge: Path | None) -> Answer:
    """Say which runs would be evaluated, and into which files."""
    if challenge is not None:
        return would(f"Would write {challenge} of {runs[0].path}", files=[challenge])
    due = [run for run in runs if evaluated_before(run, run_table(settings, run), asked)[0] is None]
    files = [path for run in due for path in evaluation_files(run, asked)]
    names = ", ".join(str(run.path) for run in due)
    what = f"Would evaluate {names} on {asked.split}" if due else "Nothing to do: all was evaluated already"
    return would(what, runs=[run.path for run in due], files=files)


def _levels(text: str) -> tuple[int, ...]:
    levels = text.split(",")
    if len(levels) != 3 or not {*levels} <= {*"012345"}:
        raise ConfigError(f"--sls {text}: expected three levels of 0 to 5, such as 2,3,3.")
    return tuple(map(int, levels))


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _show(found: Evaluated) -> None:
    """Print one run's subsets, groups of clips and missing rates."""
    if found.was_there:
        tell("Nothing to do: this was evaluated already.")
    evaluation = found.evaluation
    rows = evaluation.of("all")
    seen = "" if evaluation.views == 1 else f", {evaluation.views} views averaged"
    title = (
        f"{evaluation.split}, {rows[0].n_clips} clips{seen}: accuracy in percent\n"
        "complete: clips that have all of the subset; of the action: lower 95 percent\n"
        "bound, top-5 and calibration error"
    )
    names = list(evaluation.majority)
    shown = Table("subset", "complete", *names, "bound", "top-5", "ECE", title=title, title_justify="left")
    for row in rows:
        of_action = (_percent(part[ACTION]) for part in (row.low, row.top5, row.ece))
        shown.add_row(row.subset, str(row.n_complete), *(_percent(row.accuracy[n]) for n in names), *of_action)
    shown.add_row("commonest", "", *(_percent(evaluation.majority[name]) for name in names), style="dim")
    out.print(shown)
    _show_groups(evaluation)
    rates = Table("missing", *names, title="each modality of a clip missing at random", title_justify="left")
    for each in evaluation.rates:
        rates.add_row(f"{each.rate:.0%}", *(_spread(each.mean[name], each.std[name]) for name in names))
    out.print(rates)


def _show_groups(evaluation: Evaluation) -> None:
    groups = list(dict.fromkeys(row.group for row in evaluation.rows))
    if len(groups) < 2:
        return
    names = list(evaluation.majority)
    title = f"all modalities ({evaluation.rows[0].subset})"
    shown = Table("clips", "number", *names, title=title, title_justify="left")
    for group in groups:
        row = evaluation.of(group)[0]
        shown.add_row(group, str(row.n_clips), *(_percent(row.accuracy[name]) for name in names))
    out.print(shown)


def _show_together(found: list[Evaluated], stem: Path) -> None:
    """Print several runs side by side and write the table."""
    from .distill.compare import compare, write_comparison

    evaluations = [each.evaluation for each in found]
    columns = compare(evaluations)
    title = f"{evaluations[0].split}: action accuracy in percent, mean and deviation over seeds"
    shown = Table("subset", *(f"{column.label}\n{_counted(column)}" for column in columns), title=title)
    for subset in columns[0].mean:
        cells = [_spread(column.mean[subset][ACTION], column.std[subset][ACTION]) for column in columns]
        shown.add_row(subset, *cells)
    if columns[0].rank is not None:
        shown.add_row("average rank", *(f"{column.rank:.2f}" for column in columns), style="bold")
    out.print(shown)
    rates = Table("modalities missing", *(column.label for column in columns))
    for rate in columns[0].rates:
        rates.add_row(f"{rate:.0%}", *(_spread(*column.rates[rate]) for column in columns))
    out.print(rates)
    if len({each.clips for each in evaluations}) > 1:
        tell("These runs were not evaluated on the same clips: some could not be read. See the failures of each.")
    tell("Side by side: " + ", ".join(str(path) for path in write_comparison(columns, stem)))


def _counted(column: "Column") -> str:
    return column.runs[0] if len(column.runs) == 1 else f"{len(column.runs)} runs"


def _spread(mean: float | None, std: float | None) -> str:
    return _percent(mean) if std is None else f"{_percent(mean)} ± {_percent(std)}"
