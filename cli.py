"""The commands: parse, call one stage, print one table.  stderr tells, stdout answers.

Exit codes: 0 done, 1 an error of ours in one line, 2 wrong usage, 3 finished but some clips failed, 4 verification
found damage, 130 interrupted.
"""

import ctypes
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_app import app as serve_app
from .cli_cache import cache_app
from .cli_data import check, init
from .cli_doctor import doctor
from .cli_evaluate import evaluate
from .cli_export import export
from .cli_options import (
    DAMAGED,
    INTERRUPTED,
    SOME_FAILED,
    Answer,
    Settings,
    complain,
    loud,
    out,
    sample_data,
    tell,
    tell_some,
    with_flags,
    with_options,
    would,
)
from .cli_predict import predict
from .cli_report import report
from .cli_sweep import sweep
from .data.errors import KarmmaError, is_memory_short, memory_short, printable
from .data.modality import letters
from .data.places import storage_errors
from .data.runs import RunFolder
from .distill.stage import distill_student, plan_student
from .extract.stage import ExtractReport, extract_tokens, plan_extraction
from .fuse.config import TrainingConfig
from .fuse.stage import plan_teacher, train_teacher

RESUMED = ("train-teacher", "distill")  # commands that go on where they were only if told so
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h

app = typer.Typer(
    name="karmma",
    help="Action recognition that keeps working when a modality is missing: extract, train-teacher, distill, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(cache_app, name="cache")
app.command("evaluate")(evaluate)
app.command("predict")(predict)
app.command("app")(serve_app)
app.command("export")(export)
app.command("report")(report)
app.command("sweep")(sweep)
app.command("doctor")(doctor)
app.command("init")(init)
app.command("check")(check)


@app.command("extract")
@with_options("data", "extract")
def extract(*, settings: Settings) -> Answer:
    """Run the frozen backbones once; tokens go to Zarr shards in the cache.

    \b
    Examples:
      karmma extract
      karmma extract --modality flow --workers 4
      karmma extract --table clips.csv --cache s3://bucket/cache --part 1/4
    """
    table = settings.table()
    own = settings.data.own_modalities
    tell_some([f"{name} is not extracted but imported: karmma cache import FILE" for name in own])
    if settings.dry_run:
        due = plan_extraction(table, settings.data, settings.extract)
        n_due = sum(due.values())
        listed = ", ".join(f"{n} of {modality}" for modality, n in due.items())
        what = f"Would extract {n_due} (clip, view): {listed}" if n_due else "Nothing to do: the cache is complete"
        return would(f"{what}, in {settings.data.cache}", cache=settings.data.cache, due=due)
    report = extract_tokens(table, settings.data, settings.extract)
    tell_some(report.changes)
    shown = Table("modality", "present", "absent", "failed", "identity")
    for modality, counts in report.counts.items():
        numbers = [str(counts[name]) for name in ("present", "absent", "failed")]
        shown.add_row(modality, *numbers, report.stores[modality].stem)
    out.print(shown)
    _tell_extraction(report, settings.extract.part)
    return Answer(vars(report), SOME_FAILED if report.n_failed else 0)


def _tell_extraction(report: ExtractReport, part: str) -> None:
    """Say what failed, how far bfloat16 is off, what was written, and what comes next."""
    for modality, failures in report.failures.items():
        tell_some([f"failed: {modality} of {clip_id}: {reason}" for clip_id, reason in failures.items()])
    for modality, found in report.agreement.items():
        tell(
            f"{modality}: sampled bfloat16 tokens have a cosine of {found['mean']:.5f} to float32 (mean), "
            f"{found['least']:.5f} (least)"
        )
    if report.n_written:
        tell(f"Extracted {report.n_written} (clip, view, modality).")
    else:
        tell("Nothing to do: " + ("the cache is complete." if part == "1/1" else f"part {part} is complete."))
    if report.n_failed:
        tell(f"{report.n_failed} failed. Mend the files and run again with --retry-failed.")
    else:
        tell(f"Next: karmma train-teacher --cache {report.cache}")


@app.command("train-teacher")
@with_options("data", "teacher")
def teach(*, settings: Settings) -> Answer:
    """Train the light fusion head from the cache and store the teacher's logits.

    \b
    Examples:
      karmma train-teacher --cache ./cache
      karmma train-teacher --modality video,audio --max-lr 1e-3 --seed 1
      torchrun --nproc-per-node 4 --no-python karmma train-teacher
    """
    if settings.dry_run:
        plan = plan_teacher(settings.table(), settings.data, settings.teacher)
        return _would_train(plan.run, plan.is_done, plan.modalities, settings.teacher)
    report = train_teacher(settings.table(), settings.data, settings.teacher)
    tell(f"Modalities: {letters(report.modalities)}")
    print_result(report.run, report.result, report.was_there)
    tell(f"Wrote {report.run} and {report.logits}. Next: karmma distill")
    return Answer(vars(report))


def _would_train(run: RunFolder, is_done: bool, modalities: Sequence[str], config: TrainingConfig) -> Answer:
    what = f"Would train {run.path} on {letters(modalities)} for {config.epochs} epochs"
    what = f"Nothing to do: {run.path} was trained from exactly this already" if is_done else what
    return would(what, run=run.path, was_there=is_done, modalities=modalities)


@app.command("distill")
@with_options("data", "student")
def distil(
    *,
    settings: Settings,
    n_checked: Annotated[
        int | None,
        typer.Option(
            "--check-teacher", min=1, help="train nothing; hold cached logits of n clips against a live teacher"
        ),
    ] = None,
) -> Answer:
    """Train the end-to-end student on raw clips beside the cached teacher.

    \b
    Examples:
      karmma distill
      karmma distill --variant baseline --seed 1
      karmma distill --modality video,audio --epochs 30 --decoded-gb 50
      karmma distill --check-teacher 16
    """
    if settings.dry_run:
        plan = plan_student(settings.table(), settings.data, settings.student)
        if n_checked:
            return would(f"Would hold logits of {plan.teacher.digest} for {n_checked} clips against a live teacher")
        modalities = settings.student.modalities_of(settings.data)
        return _would_train(plan.run, plan.run.is_finished, modalities, settings.student)
    if n_checked:
        return _check_teacher(settings, n_checked)
    report = distill_student(settings.table(), settings.data, settings.student)
    tell(f"Modalities: {letters(report.modalities)}, teacher: {report.teacher}")
    print_result(report.run, report.result, report.was_there)
    tell_some([f"allowed to fail: {clip_id}: {reason}" for clip_id, reason in report.result["failed"].items()])
    tell(f"Wrote {report.run}. Next: karmma evaluate {report.run}")
    return Answer(vars(report))


def _check_teacher(settings: Settings, n_clips: int) -> Answer:
    """Say how far cached logits are from those of a live teacher on some clips."""
    from .distill.live import check_teacher

    found = check_teacher(settings.table(), settings.data, settings.extract, settings.student, n_clips)
    out.print(
        f"{found.teacher}: {found.n_clips} clips replayed, largest difference {found.error:.1e} of logits up to "
        f"{found.largest:.1f}, {found.n_agree} of {found.n_answers} first classes the same",
        soft_wrap=True,
        highlight=False,
    )
    if not found.is_near:
        tell("More than rounding: clips, or what reads them, have changed. Run karmma extract and train-teacher again.")
    return Answer(vars(found), 0 if found.is_near else DAMAGED)


def print_result(run: Path, result: dict[str, Any], was_there: bool) -> None:
    """Print what a training reached on validation."""
    if was_there:
        tell(f"Nothing to do: {run} was trained from exactly this already.")
    names = [name for name in result["val"] if name != "loss"]
    table = Table("run", "parameters (M)", "best epoch", *(f"val {name} (%)" for name in names))
    numbers = ["-" if result["val"][name] is None else f"{100 * result['val'][name]:.1f}" for name in names]
    table.add_row(run.name, f"{result['parameters'] / 1e6:.2f}", str(result["epoch"]), *numbers)
    out.print(table)


@app.command("demo")
@with_flags
def demo(*, dry_run: bool) -> Answer:
    """Run the whole pipeline on the embedded sample data, in ./karmma-sample, ./cache and ./runs.

    \b
    Examples:
      karmma demo
    """
    commands = ("extract", "train-teacher", "distill", "evaluate", "report")
    if dry_run:
        return would(f"Would run {', '.join(commands)} on the sample data", commands=commands)
    settings = sample_data()
    for command in commands:
        tell("")
        tell(f"$ karmma {command}")
        resumed = ["--resume"] if command in RESUMED else []
        code = app([command, "--config", str(settings), *resumed], standalone_mode=False)
        if code:
            raise typer.Exit(code)
    return Answer({"commands": commands, "settings": settings})


class LogHandler(logging.Handler):
    """Shows what modules log on every rank, line by line, without what a terminal would obey."""

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            loud.print(printable(line), soft_wrap=True, markup=False)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for what comes next; one that is not glibc is left alone.

    By default it gives every large block back at once, and the system hands it out again page by page, as zeros: with a
    small student that is a third of each training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def _again(words: Sequence[str]) -> str:
    """Return the command that goes on with an interrupted one."""
    resumed = ["--resume"] if {*words[:1]} & {*RESUMED} and "--resume" not in words else []
    return shlex.join(["karmma", *words, *resumed])


def _call() -> None:
    """Run the command; Ctrl-C in the middle of a class that is being defined comes as a RuntimeError in Python 3.11."""
    try:
        app()
    except RuntimeError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None
        raise


def main() -> None:
    """Run the command line; an error of ours becomes one line and exit code 1."""
    # Reading threads and torch's own share the cores: torch's must sleep while they wait, not spin (up to 8x slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, handlers=[LogHandler()])
    try:
        _call()
    except KarmmaError as error:
        complain(error)
        sys.exit(1)
    except storage_errors() as error:  # a disk or a store that gave up half way
        complain(error, ". What was finished is kept; mend that and give the command again.")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_memory_short(error):
            raise
        complain(memory_short(error, "", "Close other programs and try again."))
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as ended:  # the former while the command was still being put together
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:
            raise
        tell(f"Interrupted. What was finished is kept. To go on: {_again(sys.argv[1:])}")
        sys.exit(INTERRUPTED)
