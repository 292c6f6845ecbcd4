"""`karmma report`: one page about runs, or what models cost, as tables and plots."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

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
from .data.errors import ConfigError, RunError, cause
from .data.progress import watched
from .data.runs import RunFolder
from .distill.results import Asked
from .distill.stage import evaluate, predictions_path

if TYPE_CHECKING:
    from .distill.blueprint import Blueprint
    from .distill.efficiency import Efficiency

THETAS = ["none", "500", "300", "100"]


@with_options("data", needs_clips=False)
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="run folders (default: the latest student; for --efficiency, the settings)"),
    ] = None,
    *,
    settings: Settings,
    split: Annotated[str, typer.Option(help="of the page: train, val or test")] = "test",
    efficiency: Annotated[
        bool, typer.Option("--efficiency", help="only what models cost: parameters, GFLOPs, latency and memory")
    ] = False,
    classes: Annotated[
        list[str] | None, typer.Option(help="head=classes (default: the table's, or EPIC-KITCHENS-100's 97 and 300)")
    ] = None,
    theta: Annotated[list[str], typer.Option(help="Theta-Average values to compare; none keeps all tokens")] = THETAS,
    repeats: Annotated[
        int | None, typer.Option(min=0, help="timed passes of each subset; 0 only counts (default: 3, for the page 0)")
    ] = None,
    device: Annotated[str, typer.Option(help="torch device to measure on")] = "auto",
    into: Annotated[Path | None, typer.Option(help="folder for the files (default: the runs folder)")] = None,
) -> Answer:
    """Write one HTML page about runs, evaluated if they are not yet; or what models cost, with --efficiency.

    \b
    Examples:
      karmma report
      karmma report runs/student-* --split val --into page
      karmma report --efficiency --repeats 0
    """
    if not efficiency:
        runs = chosen_runs(settings, folders or [])
        page = _page(settings, runs, split, into)
        if settings.dry_run:
            return would(f"Would write {page}", files=[page])
        asked = Asked(split, draws=None, device=device, flow_weights=settings.data.flow_weights)
        if into:
            _folder(into)
        return _write_page(settings, runs, asked, repeats or 0, page)
    if folders and classes:
        raise typer.BadParameter("Runs have classes of their own: leave out --classes, or the runs.")
    where = into or settings.data.runs
    if settings.dry_run:
        return would(f"Would write what models cost into {where}", files=[where])
    thetas, repeats = [_theta(text) for text in theta], 3 if repeats is None else repeats
    return _efficiency(settings, folders or [], classes, thetas, repeats, device, where)


def _efficiency(
    settings: Settings,
    folders: list[Path],
    classes: list[str] | None,
    thetas: list[int | None],
    repeats: int,
    device: str,
    where: Path,
) -> Answer:
    """Show and write what the models of runs cost, or those of the settings."""
    from .distill.blueprint import run_blueprint
    from .distill.efficiency_report import write_efficiency

    _folder(where)
    blueprints = [run_blueprint(RunFolder.open(run), settings.extract) for run in folders]
    blueprints = blueprints or _configured(settings, classes)
    found = _costs(blueprints, thetas, device, repeats)
    for model in found:
        _print(model)
    files = write_efficiency(found, where)
    tell(f"Wrote {', '.join(str(path) for path in files)}. Next: {'karmma report' if folders else 'karmma extract'}")
    return Answer({"models": found, "files": files})


def _costs(blueprints: list["Blueprint"], thetas: list[int | None], device: str, repeats: int) -> list["Efficiency"]:
    """Count what models cost, and measure it unless repeats is 0."""
    from .data.device import choose_device
    from .distill.efficiency import count
    from .distill.measuring import measure

    found = [count(blueprint, thetas) for blueprint in blueprints]
    if not repeats:
        return found
    on = choose_device(device)
    with watched("measure", sum(len(model.rows) for model in found), "subsets") as progress:
        pairs = zip(blueprints, found, strict=True)
        return [measure(blueprint, model, on, repeats, progress.advance) for blueprint, model in pairs]


def _page(settings: Settings, runs: list[RunFolder], split: str, into: Path | None) -> Path:
    """Return where the page goes: of one run into its folder, of several beside them."""
    folder = into or (settings.data.runs if len(runs) > 1 else runs[0].path / "evaluation")
    return folder / (f"report-{split}.html" if len(runs) > 1 else f"{split}.html")


def _write_page(settings: Settings, runs: list[RunFolder], asked: Asked, repeats: int, page: Path) -> Answer:
    """Write the page of runs, and evaluate those that are not yet."""
    from .distill.blueprint import run_blueprint
    from .distill.evaluate import predict_run
    from .distill.examples import examples
    from .distill.report import Reported, write_report

    reported, failed = [], 0
    for run in runs:
        table = run_table(settings, run)
        found = predict_run(run, table, settings.data.cache, asked, predictions_path(run, asked))
        evaluation = evaluate(run, table, settings.data.cache, asked, found).evaluation
        try:
            (cost,) = _costs([run_blueprint(run, settings.extract)], [], asked.device, repeats)
        except (ConfigError, RunError) as error:  # a teacher's backbones are not those of the settings, or not known
            tell(f"Without its cost: {error}")
            cost = None
        reported.append(Reported(run, evaluation, cost, examples(run, table, found)))
        failed += len(evaluation.failed)
    write_report(reported, page)
    answers = [run.path for run in runs if run.config["kind"] == "student"]  # a teacher starts from tokens, not files
    more = f", or karmma predict FILE --run {answers[0]}" if answers else ""
    tell(f"Wrote {page}. Next: open it in a browser{more}")
    return Answer({"runs": [run.path for run in runs], "files": [page]}, SOME_FAILED if failed else 0)


def _configured(settings: Settings, classes: list[str] | None) -> list["Blueprint"]:
    """Return the teacher and the student of the settings, with as many classes as they will have."""
    from .distill.blueprint import EPIC, student_blueprint, teacher_blueprint

    if classes:
        n_classes = dict(_head(text) for text in classes)
        if len(n_classes) < len(classes):
            raise ConfigError(f"--classes {' '.join(classes)}: a head is named twice. Name each once.")
    elif settings.data.table is not None:
        table = settings.table()
        n_classes = {head: len(table.classes(head)) for head in settings.data.heads}
    else:
        n_classes = EPIC
        tell("No clip table: with the classes of EPIC-KITCHENS-100, 97 verbs and 300 nouns. Set others with --classes.")
    data = settings.data
    own = data.own_modalities
    tell_some([f"Without {name}: what is imported has a size only in a run that used it." for name in own])
    return [
        teacher_blueprint(data, settings.extract, settings.teacher, n_classes),
        student_blueprint(data, settings.student, n_classes),
    ]


def _folder(path: Path) -> None:
    """Make a folder now: nobody wants to hear after minutes that it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: {cause(error)}. Name a folder that can be written with --into.") from None


def _theta(text: str) -> int | None:
    if text != "none" and not (text.isdecimal() and int(text) > 0):
        raise ConfigError(f"--theta {text}: expected a number of tokens from 1 on, or none. Try --theta 300.")
    return None if text == "none" else int(text)


def _head(text: str) -> tuple[str, int]:
    head, _, n_classes = text.partition("=")
    if not head or not n_classes.isdecimal() or not 0 < int(n_classes) <= 10**6:
        raise ConfigError(f"--classes {text}: expected head=classes, at most a million, such as verb=97.")
    return head, int(n_classes)


def _print(model: "Efficiency") -> None:
    frozen = f", {model.frozen / 1e6:.2f} M frozen" if model.frozen else ""
    heads = ", ".join(f"{head} {n}" for head, n in model.n_classes.items())
    title = f"{model.name}: {model.trained / 1e6:.2f} M trained{frozen}; Theta {model.theta or 'none'}; {heads}"
    if model.imported:
        title += f"; without the backbones of imported {', '.join(model.imported)}"
    measured = [f"latency (s, {model.device})", "memory (MiB)"] if model.device else []
    stand_ins = f"GFLOPs, missing: {model.missing}"
    columns = ("subset", "alone (M)", "GFLOPs, missing: left out", stand_ins, *measured)
    table = Table(*columns, title=Text(title), title_justify="left")
    for row in model.rows:
        figures = [f"{row.alone / 1e6:.2f}", f"{row.gflops:.6f}", f"{row.gflops_as_run:.6f}"]
        if model.device:
            memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
            figures += [f"{row.seconds:.3f}", memory]
        table.add_row(row.subset, *figures)
    out.print(table)
    if model.by_theta:
        shown = Table("subset", *(f"GFLOPs at Theta {theta}" for theta in model.by_theta))
        for row in model.rows:
            shown.add_row(row.subset, *(f"{gflops[row.subset]:.6f}" for gflops in model.by_theta.values()))
        out.print(shown)
