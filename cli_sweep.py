"""The command `karmma sweep`: many teachers from one cache, and the settings of the best."""

from typing import Annotated

import typer
from rich.table import Table

from .cli_options import Answer, Settings, out, tell, with_options, would
from .data.errors import ConfigError
from .fuse.config import SweepConfig
from .fuse.space import option
from .fuse.sweep import SweepReport, plan_sweep, sweep_teacher

SHOWN = 10


@with_options("data", "teacher", "sweep")
def sweep(
    varied: Annotated[
        list[str],
        typer.Argument(help="what to vary, such as max_lr=1e-4..1e-2,log alpha=0.5,0.7,0.9 modality=video+audio,video"),
    ] = [],  # noqa: B006
    *,
    settings: Settings,
) -> Answer:
    """Train many teachers from the cache under settings that vary; end with a table, a plot and the best settings.

    \b
    Examples:
      karmma sweep max_lr=1e-4..1e-2,log
      karmma sweep alpha=0.5,0.7,0.9 modality=video+audio,video --workers 4
      karmma sweep max_lr=1e-4..1e-2,log --sampler tpe --trials 50
    """
    asked = _asked(varied, settings.sweep)
    if settings.dry_run:
        plan = plan_sweep(settings.table(), settings.data, settings.teacher, asked)
        what = f"Would train {plan.n_trials} teachers that differ in {', '.join(asked.space)} in {plan.folder}"
        return would(what, folder=plan.folder, trials=plan.n_trials)
    report = sweep_teacher(settings.table(), settings.data, settings.teacher, asked)
    best = report.folder / "best.toml"
    settings.write(best, *report.settings)
    _show(report)
    tell(f"All trials: {', '.join(str(file) for file in report.files)}")
    tell(f"Wrote {best}. Next: karmma train-teacher --config {best}")
    trials = [
        {"number": each.number, "state": each.state.name.lower(), "value": each.value, "params": each.params}
        for each in report.trials
    ]
    return Answer({"folder": report.folder, "best": best, "trials": trials, "files": report.files})


def _asked(varied: list[str], config: SweepConfig) -> SweepConfig:
    """Return a sweep over what is named on the command line, and beside it over what the settings vary."""
    space: dict[str, str] = {}
    for text in varied:
        name, equals, values = text.partition("=")
        if not equals or option(name) in space:
            raise ConfigError(f"{text}: expected option=values, each option once, such as max_lr=1e-4..1e-2,log.")
        space[option(name)] = values
    written = {name: values for name, values in config.space.items() if option(name) not in space}
    return config.model_copy(update={"space": written | space})


def _show(report: SweepReport) -> None:
    """Print the best trials, and why others failed."""
    from .fuse.sweep_report import n_epochs  # the library of studies, which no other command waits for

    fields = list(report.trials[0].params)
    title = f"{len(report.trials)} trials; value: action accuracy on validation, or if there is none minus the loss"
    shown = Table("trial", "state", "value", "epochs", *fields, title=title, title_justify="left")
    for trial in report.trials[:SHOWN]:
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        chosen = [_short(trial.params.get(field, "")) for field in fields]
        shown.add_row(str(trial.number), trial.state.name.lower(), value, str(n_epochs(trial)), *chosen)
    out.print(shown)
    failed = [trial for trial in report.trials if "reason" in trial.user_attrs]
    for trial in failed[:SHOWN]:
        tell(f"trial {trial.number} failed: {trial.user_attrs['reason']}")


def _short(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
