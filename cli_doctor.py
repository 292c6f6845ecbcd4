"""`karmma doctor`: is all well for what the settings say, and what does a data set need before one begins?"""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from .cli_options import Answer, Settings, out, tell, with_options, would
from .data.errors import printable

if TYPE_CHECKING:
    from .distill.checkup import Finding

COLORS = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


@with_options("data", "extract", "teacher", "student", needs_clips=False)
def doctor(
    *,
    settings: Settings,
    clips: Annotated[int | None, typer.Option(min=1, help="decode frames of so many clips (default: of all)")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="what EPIC-KITCHENS-100, Something-Something V2, Ego4D and one's table need")
    ] = False,
    tflops: Annotated[
        float,
        typer.Option(
            min=0.001, max=1e9, help="10^12 operations a second that a GPU sustains (ours: a third of an A100)"
        ),
    ] = 50.0,
) -> Answer:
    """Check environment, codecs, GPU, clips, frames, disk and weights: PASS, WARN or FAIL, and the next step.

    It exits with 1 if anything fails.  With --plan: GB of cache, GPU hours and GB/s that each GPU reads, by data set.

    \b
    Examples:
      karmma doctor
      karmma doctor --clips 200 --preset paper
      karmma doctor --plan --tflops 150
    """
    if plan:
        return _plan(settings, tflops)
    if settings.dry_run:
        return would(f"Would look at the environment, and at the clips of {settings.data.table}")
    from .distill.checkup import Checkup

    checkup = Checkup(settings.data, settings.extract, settings.teacher, settings.student, clips)
    findings = list(checkup.findings())
    _show(findings)
    failed = [each.check for each in findings if each.verdict == "FAIL"]
    tell(f"Failed: {', '.join(failed)}. Mend that, then karmma doctor." if failed else "Next: karmma extract")
    return Answer({"findings": findings}, 1 if failed else 0)


def _show(findings: "list[Finding]") -> None:
    """Print one row a check."""
    shown = Table("check", "", show_lines=True)
    for name in ("found", "next step"):
        shown.add_column(name, overflow="fold")
    for each in findings:
        verdict = Text(each.verdict, style=COLORS[each.verdict])
        shown.add_row(Text(each.check), verdict, Text(printable(each.found)), Text(each.step))
    out.print(shown)


def _plan(settings: Settings, tflops: float) -> Answer:
    """Print what data sets need, one's own first."""
    from .distill.needs import DATA_SETS, DataSet, need, side_by_side

    chosen = list(DATA_SETS)
    if settings.data.table is not None and settings.data.read_modalities:
        chosen.insert(0, DataSet.of(settings.table(), settings.data))
    if settings.dry_run:
        return would(f"Would count what {', '.join(each.name for each in chosen)} need")
    stages = (settings.data, settings.extract, settings.teacher, settings.student, tflops)
    needs = [need(each, *stages) for each in chosen]
    header, *rows = side_by_side(needs)
    shown = Table(title=f"at {tflops:g} TFLOPS sustained", title_justify="left")
    for name in header:  # as text: brackets in a path are no markup
        shown.add_column(Text(printable(name)))
    for row in rows:
        shown.add_row(*row)
    out.print(shown)
    tell("Operations are counted, not measured. Disks and decoding come on top.")
    return Answer({"needs": needs})
