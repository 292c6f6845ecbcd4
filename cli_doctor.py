"""`karmma doctor`: what a data set needs before one begins."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .cli_options import Settings, out, tell, with_options
from .data.errors import printable


@with_options("data", "extract", "teacher", "student", needs_clips=False)
def doctor(
    *,
    settings: Settings,
    plan: Annotated[
        bool, typer.Option("--plan", help="what EPIC-KITCHENS-100, Something-Something V2, Ego4D and one's table need")
    ] = False,
    tflops: Annotated[
        float,
        typer.Option(
            min=0.001, max=1e9, help="10^12 operations a second that a GPU sustains (ours: a third of an A100)"
        ),
    ] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON value instead of a table")] = False,
) -> None:
    """Say what data sets need under these settings: GB of cache, GPU hours, GB/s that each GPU reads."""
    if not plan:
        raise typer.BadParameter("Say what is to be looked at: --plan.")
    from .distill.needs import DATA_SETS, DataSet, need, side_by_side

    chosen = list(DATA_SETS)
    if settings.data.table is not None:
        table = settings.table()
        n_train, heads = len(table.rows("train")), settings.data.heads
        n_classes = {head: len(table.classes(head)) for head in heads}
        own = DataSet(str(table.path), n_train, table.n_clips - n_train, settings.data.modalities, n_classes)
        chosen.insert(0, own)
    stages = (settings.data, settings.extract, settings.teacher, settings.student, tflops)
    needs = [need(each, *stages) for each in chosen]
    if as_json:
        out.print(json.dumps([asdict(each) for each in needs]), soft_wrap=True, markup=False, highlight=False)
        return
    header, *rows = side_by_side(needs)
    shown = Table(title=f"at {tflops:g} TFLOPS sustained", title_justify="left")
    for name in header:  # as text: brackets in a path are no markup
        shown.add_column(Text(printable(name)))
    for row in rows:
        shown.add_row(*row)
    out.print(shown)
    tell("Operations are counted, not measured. Disks and decoding come on top.")
