"""What the commands share: messages, answers, and settings from files and from options that the config models imply."""

import inspect
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import typer
from rich.console import Console

from .data.annotations import ClipTable
from .data.clips import read_clips
from .data.config import DataConfig, StageConfig
from .data.errors import KarmmaError, RunError, printable
from .data.modality import MODALITIES
from .data.places import storage_errors
from .data.progress import IS_SILENT, watched
from .data.runs import RunFolder, latest_run
from .data.sample import write_sample
from .data.settings import PRESETS, assigned, read_preset, read_toml, resolve, rooted, write_toml
from .distill.config import StudentConfig
from .extract.config import ExtractConfig
from .fuse.config import SweepConfig, TeacherConfig

SECTIONS: dict[str, type[StageConfig]] = {
    "data": DataConfig,
    "extract": ExtractConfig,
    "teacher": TeacherConfig,
    "student": StudentConfig,
    "sweep": SweepConfig,
}
Sections = dict[str, dict[str, Any]]  # section -> field -> value
SAMPLE = Path("karmma-sample")
SOME_FAILED, DAMAGED, INTERRUPTED = 3, 4, 130
# What every rank has to say, and what is the same on all of them.
loud = Console(stderr=True, highlight=False, emoji=False)
out, err = Console(quiet=IS_SILENT), Console(stderr=True, highlight=False, emoji=False, quiet=IS_SILENT)


def tell(text: str) -> None:
    """Say something to the person at the terminal."""
    err.print(printable(text), soft_wrap=True, markup=False)


def complain(error: Exception, more: str = "") -> None:
    """Say what went wrong; unlike `tell`, on every rank."""
    loud.print(f"{type(error).__name__}: {error}{more}", soft_wrap=True, markup=False)


def tell_some(lines: Sequence[str]) -> None:
    """Say the first ten lines, and how many more there are."""
    for line in lines[:10]:
        tell(line)
    if len(lines) > 10:
        tell(f"and {len(lines) - 10} more")


@dataclass(frozen=True)
class Answer:
    """What came of a command: the JSON value that --json prints, where others see tables, and the exit code."""

    said: Mapping[str, Any]
    code: int = 0


def would(what: str, **facts: Any) -> Answer:
    """Answer --dry-run: say what a command would do, or that there is nothing to do."""
    tell(f"{what} (--dry-run: nothing was done)")
    return Answer({"dry_run": True, "would": what, **facts})


def with_flags(command: Callable[..., Answer]) -> Callable[..., None]:
    """Give a command --json, --dry-run and --debug; it is called with `dry_run` and its own parameters."""
    own = [p for name, p in inspect.signature(command).parameters.items() if name != "dry_run"]
    parameters = [*own, *inspect.signature(_flags).parameters.values()]

    def run(as_json: bool, debug: bool, **given: Any) -> None:
        was_quiet, out.quiet = out.quiet, out.quiet or as_json
        try:
            answer = command(**given)
        except storage_errors(KarmmaError, MemoryError, RuntimeError) as error:  # a line of ours; others show theirs
            if debug:
                loud.print("".join(traceback.format_exception(error)), soft_wrap=True, markup=False)
            raise
        finally:
            out.quiet = was_quiet
        if as_json and not out.quiet:
            typer.echo(json.dumps(_plain(answer.said), allow_nan=False))
        if answer.code:
            raise typer.Exit(answer.code)

    _imitate(run, command, parameters)
    return run


def _flags(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON value instead of tables")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, and do nothing (but make sample data)")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show where in the program an error came from")] = False,
) -> None:
    """Carry the flags that every command has."""


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: records as objects, paths as text, and None for what is no number."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in dataclass_fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _imitate(run: Callable[..., Any], command: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> None:
    """Show a wrapper to typer as the command, with other parameters."""
    signature = inspect.Signature(parameters)
    run.__signature__ = signature  # type: ignore[attr-defined]  # no stub knows it, but inspect asks for it
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__, run.__name__ = command.__doc__, command.__name__


class Settings:
    """The resolved sections of a command; dry_run: it may write nothing, but for the sample data that it looks at."""

    def __init__(
        self,
        config: Path | None,
        preset: str | None,
        assignments: list[str],
        options: Sections,
        needs_clips: bool,
        dry_run: bool = False,
    ) -> None:
        self.dry_run = dry_run
        config = config or (Path("karmma.toml") if Path("karmma.toml").exists() else None)
        if config is None and "table" not in options.get("data", {}) and (needs_clips or _sample_settings().exists()):
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
        self.sweep: SweepConfig = sections["sweep"]

    def table(self, heads: tuple[str, ...] = ()) -> ClipTable:
        """Read the clip table with its label columns, those of the data section unless others are named."""
        table = read_clips(self.data, heads)
        tell_some(table.notes)
        return table

    def write(self, path: Path, data: DataConfig, teacher: TeacherConfig) -> None:
        """Write these settings, but for two sections, as a file for --config."""
        others = {"extract": self.extract, "student": self.student}
        write_toml(path, {"data": data, "teacher": teacher, **others})


def _sample_settings() -> Path:
    return SAMPLE / "karmma.toml"


def sample_data() -> Path:
    """Return the sample data's settings, generating it on first use."""
    tell(f"No karmma.toml and no --table: using the sample data in ./{SAMPLE}")
    if _sample_settings().exists():
        return _sample_settings()
    with watched("sample data", 480, "clips") as progress:
        return write_sample(SAMPLE, progress=progress.advance)


def with_options(*places: str, needs_clips: bool = True) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    """Give a command `--config`, `--preset`, `--set`, one option for every plain field of its sections, and its flags.

    places: 'section' or 'section.field'.  needs_clips: without settings, work on the sample data.

    The command is called with `settings` and its own parameters.  A field that two sections share belongs to the later
    one, the stage's own.
    """

    def decorate(command: Callable[..., Answer]) -> Callable[..., None]:
        fields: dict[str, tuple[str, Any]] = {}
        for section, _, only in (place.partition(".") for place in places):
            known = SECTIONS[section].model_fields
            fields |= {name: (section, info) for name, info in known.items() if only in ("", name)}
        own = [p for name, p in inspect.signature(command).parameters.items() if name != "settings"]
        general = inspect.signature(_general).parameters.values()
        derived = [_option(name, info) for name, (_, info) in fields.items() if _is_plain(info.annotation)]

        def run(**given: Any) -> Answer:
            settings = {name: given.pop(name) for name in ("config", "preset", "assignments", "dry_run")}
            options: Sections = {}
            for parameter in derived:
                value = given.pop(parameter.name)
                if value not in (None, []):
                    text = ",".join(value) if isinstance(value, list) else value
                    options.setdefault(fields[parameter.name][0], {})[parameter.name] = text
            return command(settings=Settings(options=options, needs_clips=needs_clips, **settings), **given)

        _imitate(run, command, [*own, *general, *derived])
        return with_flags(run)

    return decorate


def _one_of(words: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what completes the beginning of a word on the command line."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _general(
    *,
    config: Annotated[Path | None, typer.Option(help="settings file (default ./karmma.toml)")] = None,
    preset: Annotated[str | None, typer.Option(help="tiny or paper", autocompletion=_one_of(PRESETS))] = None,
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
    words = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    words = MODALITIES if name == "modalities" else words
    annotation = Annotated[
        kind | None, typer.Option(flag, help=told, show_default=False, autocompletion=_one_of(words) if words else None)
    ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def run_table(settings: Settings, run: RunFolder) -> ClipTable:
    """Read the clip table for a run, with its heads."""
    tell(f"Run: {run.path}")
    described = run.config if isinstance(run.config, dict) else {}
    if not (isinstance(described.get("classes"), dict) and "clips" in described):
        raise RunError(f"{run.path}: config.json is not that of a student or teacher of this version. Train it again.")
    table = settings.table(tuple(described["classes"]))
    if table.content_digest() != described["clips"]:
        tell(f"{table.path} is not, or no longer, the table that this run was trained from; evaluating on it as it is.")
    return table


def chosen_runs(settings: Settings, folders: Sequence[Path]) -> list[RunFolder]:
    """Return the finished runs that are named, each once: twice is no second seed; if none is, the latest student."""
    runs = [RunFolder.open(folder) for folder in folders]
    return list({run.path.resolve(): run for run in runs}.values()) or [latest_run(settings.data.runs, "student")]


def chosen_student(settings: Settings, folder: Path | None) -> RunFolder:
    """Return the finished run that is named, or the latest student; raises RunError if it is a teacher's."""
    from .distill.student import student_settings  # torch, which --help does not wait for

    (run,) = chosen_runs(settings, [folder] if folder else [])
    student_settings(run.config, run.path, settings.data.flow_weights)
    tell(f"Run: {run.path}")
    return run
