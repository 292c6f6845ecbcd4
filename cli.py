"""The commands: parse, call one stage, print one table.  stderr tells, stdout answers.

Exit codes: 0 done, 1 an error of ours in one line, 2 wrong usage, 3 finished but some clips failed, 130 interrupted.
"""

import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_origin

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from .data.annotations import SPLITS, ClipTable
from .data.clips import read_clips, read_rows
from .data.config import DataConfig, StageConfig
from .data.errors import KarmmaError
from .data.modality import letters
from .data.progress import watched
from .data.runs import RunFolder, latest_run
from .data.sample import write_sample
from .data.settings import assigned, read_preset, read_toml, resolve, rooted
from .distill.config import StudentConfig
from .distill.stage import distill_student, evaluate_student
from .extract.config import ExtractConfig
from .extract.stage import extract_tokens
from .fuse.config import TeacherConfig
from .fuse.stage import train_teacher

SECTIONS: dict[str, type[StageConfig]] = {
    "data": DataConfig,
    "extract": ExtractConfig,
    "teacher": TeacherConfig,
    "student": StudentConfig,
}
SAMPLE = Path("karmma-sample")
SOME_FAILED, INTERRUPTED = 3, 130

app = typer.Typer(
    name="karmma",
    help="Action recognition that keeps working when a modality is missing: extract, train-teacher, distill, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True, highlight=False)


def tell(text: str) -> None:
    """Say something to the person at the terminal."""
    err.print(text, soft_wrap=True, markup=False)


def tell_some(lines: Sequence[str]) -> None:
    """Say the first ten lines, and how many more there are."""
    for line in lines[:10]:
        tell(line)
    if len(lines) > 10:
        tell(f"and {len(lines) - 10} more")


class Settings:
    """The resolved sections of a command, and where they came from."""

    def __init__(self, config: Path | None, preset: str | None, assignments: list[str], options: dict) -> None:
        config = config or (Path("karmma.toml") if Path("karmma.toml").exists() else None)
        if config is None and "table" not in options.get("data", {}):
            config = sample_data()
        written = rooted(read_toml(config), config.resolve().parent) if config else {}
        preset = preset or written.pop("preset", "paper")
        written.pop("preset", None)
        layers = [(f"preset {preset}", read_preset(preset)), (str(config), written)]
        layers += [("--set", assigned(text)) for text in assignments]
        sections = resolve(SECTIONS, *layers, ("option", options))
        self.data: DataConfig = sections["data"]
        self.extract: ExtractConfig = sections["extract"]
        self.teacher: TeacherConfig = sections["teacher"]
        self.student: StudentConfig = sections["student"]

    def table(self, heads: tuple[str, ...] = ()) -> ClipTable:
        """Read the clip table with its label columns, those of the data section unless others are named."""
        table = read_clips(self.data, heads)
        tell_some(table.notes)
        return table


def sample_data() -> Path:
    """Return the sample data's settings, generating it on first use."""
    tell(f"No karmma.toml and no --table: using the sample data in ./{SAMPLE}")
    if (SAMPLE / "karmma.toml").exists():
        return SAMPLE / "karmma.toml"
    with watched("sample data", 480, "clips") as progress:
        return write_sample(SAMPLE, progress=progress.advance)


def with_options(*places: str) -> Callable[[Callable], Callable]:
    """Give a command `--config`, `--preset`, `--set` and one option for every plain field of its sections.

    places: 'section' or 'section.field'.  The command is called with `settings` and its own parameters.  A field that
    two sections share belongs to the later one, the stage's own.
    """

    def decorate(command: Callable) -> Callable:
        fields: dict[str, tuple[str, Any]] = {}
        for section, _, only in (place.partition(".") for place in places):
            known = SECTIONS[section].model_fields
            fields |= {name: (section, info) for name, info in known.items() if only in ("", name)}
        own = [p for name, p in inspect.signature(command).parameters.items() if name != "settings"]
        general = inspect.signature(_general).parameters.values()
        derived = [_option(name, info) for name, (_, info) in fields.items() if _is_plain(info.annotation)]

        def run(**given: Any) -> Any:
            settings = {name: given.pop(name) for name in ("config", "preset", "assignments")}
            options: dict[str, dict[str, Any]] = {}
            for parameter in derived:
                value = given.pop(parameter.name)
                if value not in (None, []):
                    text = ",".join(value) if isinstance(value, list) else value
                    options.setdefault(fields[parameter.name][0], {})[parameter.name] = text
            return command(settings=Settings(options=options, **settings), **given)

        run.__signature__ = inspect.Signature([*own, *general, *derived])
        run.__annotations__ = {p.name: p.annotation for p in [*own, *general, *derived]}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _general(
    *,
    config: Annotated[Path | None, typer.Option(help="settings file (default ./karmma.toml)")] = None,
    preset: Annotated[str | None, typer.Option(help="tiny or paper")] = None,
    assignments: Annotated[list[str], typer.Option("--set", help="section.field=value, for any setting")] = [],  # noqa: B006
) -> None:
    """Carry the options that every command has."""


def _is_plain(annotation: Any) -> bool:
    is_model = isinstance(annotation, type) and issubclass(annotation, StageConfig)
    return not is_model and get_origin(annotation) is not dict


def _option(name: str, info: Any) -> inspect.Parameter:
    """Derive one command line option from a config field; values stay text until pydantic has seen them."""
    flag = "--modality" if name == "modalities" else "--" + name.replace("_", "-")
    kind: Any = bool if info.annotation is bool else list[str] if name == "modalities" else str
    flag = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    told = f"{info.description} (default {info.default}; {info.json_schema_extra['source']})"
    annotation = Annotated[kind | None, typer.Option(flag, help=told, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@app.command("extract")
@with_options("data", "extract")
def extract(*, settings: Settings) -> None:
    """Run the frozen backbones once; tokens go to Zarr shards in the cache."""
    report = extract_tokens(settings.table(), settings.data, settings.extract)
    tell_some(report.changes)
    table = Table("modality", "present", "absent", "failed", "identity")
    for modality, counts in report.counts.items():
        numbers = [str(counts[name]) for name in ("present", "absent", "failed")]
        table.add_row(modality, *numbers, report.stores[modality].stem)
    out.print(table)
    for modality, failures in report.failures.items():
        tell_some([f"failed: {modality} of {clip_id}: {reason}" for clip_id, reason in failures.items()])
    if report.n_written:
        tell(f"Extracted {report.n_written} (clip, view, modality).")
    else:
        tell("Nothing to do: the cache is complete.")
    if report.n_failed:
        tell(f"{report.n_failed} failed. Mend the files and run again with --retry-failed.")
        raise typer.Exit(SOME_FAILED)
    tell(f"Next: karmma train-teacher --cache {report.cache}")


@app.command("train-teacher")
@with_options("data", "teacher")
def teach(*, settings: Settings) -> None:
    """Train the light fusion head from the cache and store the teacher's logits."""
    report = train_teacher(settings.table(), settings.data, settings.teacher)
    tell(f"Modalities: {letters(report.modalities)}")
    print_result(report.run, report.result, report.was_there)
    tell(f"Wrote {report.run} and {report.logits}. Next: karmma distill")


@app.command("distill")
@with_options("data", "student")
def distil(*, settings: Settings) -> None:
    """Train the end-to-end student on raw clips beside the cached teacher."""
    report = distill_student(settings.table(), settings.data, settings.student)
    tell(f"Modalities: {letters(report.modalities)}, teacher: {report.teacher}")
    print_result(report.run, report.result, report.was_there)
    tell_some([f"allowed to fail: {clip_id}: {reason}" for clip_id, reason in report.result["failed"].items()])
    tell(f"Wrote {report.run}. Next: karmma evaluate {report.run}")


def print_result(run: Path, result: dict[str, Any], was_there: bool) -> None:
    """Print what a training reached on validation."""
    if was_there:
        tell(f"Nothing to do: {run} was trained from exactly this already.")
    names = [name for name in result["val"] if name != "loss"]
    table = Table("run", "parameters (M)", "best epoch", *(f"val {name} (%)" for name in names))
    numbers = ["-" if result["val"][name] is None else f"{100 * result['val'][name]:.1f}" for name in names]
    table.add_row(run.name, f"{result['parameters'] / 1e6:.2f}", str(result["epoch"]), *numbers)
    out.print(table)


@app.command("evaluate")
@with_options("data.table", "data.runs")
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="run folder of a student (default: the latest)")] = None,
    *,
    settings: Settings,
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    device: Annotated[str, typer.Option(help="torch device")] = "auto",
) -> None:
    """Print accuracy by head and action for every subset of modalities; write CSV, JSON and a report."""
    folder = RunFolder.open(run) if run else latest_run(settings.data.runs, "student")
    tell(f"Run: {folder.path}")
    table = settings.table(tuple(folder.config["classes"]))
    if table.content_digest() != folder.config["clips"]:
        tell(f"{table.path} is not, or no longer, the table that this run was trained from; evaluating on it as it is.")
    evaluation, files, was_there = evaluate_student(folder, table, split, device)
    if was_there:
        tell("Nothing to do: this was evaluated already.")
    n_clips = evaluation.rows[0].n_clips
    title = (
        f"{evaluation.split}, {n_clips} clips: accuracy in percent and its lower 95 percent bound\n"
        "complete: clips that have every modality of the subset"
    )
    shown = Table("subset", "complete", *evaluation.majority, title=title, title_justify="left")
    for row in evaluation.rows:
        numbers = [f"{100 * value:.1f} ({100 * row.low[head]:.1f})" for head, value in row.accuracy.items()]
        shown.add_row(row.subset, str(row.n_complete), *numbers)
    shown.add_row("majority class", "", *(f"{100 * value:.1f}" for value in evaluation.majority.values()), style="dim")
    out.print(shown)
    tell_some([f"failed: {clip_id}: {reason}" for clip_id, reason in evaluation.failed.items()])
    tell("Results: " + ", ".join(str(path) for path in files))
    raise typer.Exit(SOME_FAILED if evaluation.failed else 0)


@app.command("check")
@with_options("data")
def check(
    *,
    settings: Settings,
    write: Annotated[Path | None, typer.Option(help="write the table as read, as .csv or .parquet")] = None,
    only_good: Annotated[bool, typer.Option(help="write only clips with nothing wrong")] = False,
) -> None:
    """List every bad row of the clip table, and every clip whose files are not there or too short."""
    from .data.check import check_clips

    table, bad = read_rows(settings.data, settings.data.heads)
    tell_some(table.notes)
    with watched("check", table.n_clips, "clips") as progress:
        bad += check_clips(table, settings.data, progress.advance)
    for row in bad:
        out.print(str(row), soft_wrap=True, markup=False, highlight=False)
    wrong = {row.clip_id for row in bad}
    if write is not None:
        kept = [clip_id not in wrong or not only_good for clip_id in table.clip_ids.tolist()]
        table.kept(np.array(kept)).write(write)
        tell(f"Wrote {write}; its paths start at {table.folder}.")
    splits = ", ".join(f"{len(table.rows(split))} {split}" for split in SPLITS)
    tell(f"{table.n_clips} clips ({splits}), {len(wrong)} with something wrong.")
    raise typer.Exit(SOME_FAILED if bad else 0)


@app.command("demo")
def demo() -> None:
    """Run the whole pipeline on the embedded sample data, in ./karmma-sample, ./cache and ./runs."""
    settings = sample_data()
    for command in ("extract", "train-teacher", "distill", "evaluate"):
        tell(f"\n$ karmma {command}")
        code = app([command, "--config", str(settings)], standalone_mode=False)
        if code:
            raise typer.Exit(code)


def main() -> None:
    """Run the command line; an error of ours becomes one line and exit code 1."""
    # Reading threads and torch's own share the cores: torch's must sleep while they wait, not spin (up to 8x slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except KarmmaError as error:
        tell(f"{type(error).__name__}: {error}")
        sys.exit(1)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            tell("Interrupted. What was finished is kept; give the command again to go on.")
        raise
