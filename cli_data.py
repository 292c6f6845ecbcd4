"""`karmma init` and `karmma check`: a settings file to start from, and whether the clips it names are all there."""

from collections import Counter
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from .cli_options import SECTIONS, SOME_FAILED, Answer, Settings, out, tell, tell_some, with_flags, with_options, would
from .data.annotations import SPLITS
from .data.clips import read_rows
from .data.errors import ConfigError
from .data.places import is_address
from .data.progress import watched
from .data.publish import publish

if TYPE_CHECKING:
    from .data.starter import Starter


def _places(incomplete: str) -> list[str]:
    """Return what completes the beginning of a data set's name, or of a folder's."""
    folders = glob(f"{escape(incomplete)}*/")
    return [*(name for name in ("epic", "ssv2") if name.startswith(incomplete)), *folders]


@with_flags
def init(
    what: Annotated[
        str, typer.Argument(metavar="epic|ssv2|FOLDER", help="a data set, or a folder of clips", autocompletion=_places)
    ] = ".",
    *,
    dry_run: bool,
    annotations: Annotated[Path | None, typer.Option(help="folder of the official annotation files")] = None,
    media: Annotated[str | None, typer.Option(help="folder, or address, of the official download")] = None,
    preset: Annotated[str | None, typer.Option(help="tiny or paper (default: tiny for one's own clips)")] = None,
    output: Annotated[Path, typer.Option(help="settings file to write")] = Path("karmma.toml"),
) -> Answer:
    """Write a settings file in which every line is explained; for a folder without clips.csv, that table too.

    \b
    Examples:
      karmma init my-clips
      karmma init epic --annotations epic-kitchens-100-annotations --media /data/EPIC-KITCHENS
      karmma init ssv2 --annotations labels --media /data/ssv2
    """
    from .data.starter import settings_text, table_text  # and readers of films, which no other command waits for

    starter = _starter(what, annotations, media)
    text = settings_text(starter, preset or starter.preset, SECTIONS, output.resolve().parent)
    table, n_clips = starter.chosen["table"][0], len(starter.clips) - 1
    # The table first: settings that are there have one.
    files = ({table: table_text(starter)} if starter.clips else {}) | {output: text}
    for path in files:
        if path.exists():
            raise ConfigError(f"{path}: is there already and stays as it is. Name another file with --output.")
    named = str(output) + (f" and {table} of {n_clips} clips" if starter.clips else "")
    if dry_run:
        return would(f"Would write {named}", files=list(files))
    for path, content in files.items():
        publish(path, content.encode())
    if starter.clips:
        counts = Counter(split for _, _, split, _ in starter.clips[1:])
        labels = sorted({label for *_, label in starter.clips[1:]})
        splits = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
        tell(f"{splits}; {len(labels)} labels: {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}")
    tell(
        f"Wrote {named}. Next: read it, then karmma doctor"
        + ("" if output.name == "karmma.toml" else f" --config {output}")
    )
    return Answer({"files": list(files)})


def _starter(what: str, annotations: Path | None, media: str | None) -> "Starter":
    """Return what settings begin with."""
    from .data.starter import epic, own, ssv2

    given = media if media is None or is_address(media) else Path(media)
    if what == "epic":
        return epic(annotations or Path("epic-kitchens-100-annotations"), given or Path("EPIC-KITCHENS"))
    if what == "ssv2":
        return ssv2(annotations or Path("labels"), given or Path("ssv2"))
    if annotations or media:
        raise typer.BadParameter("--annotations and --media are those of epic and ssv2.")
    return own(Path(what))


@with_options("data")
def check(
    *,
    settings: Settings,
    write: Annotated[Path | None, typer.Option(help="write the table as read, as .csv or .parquet")] = None,
    only_good: Annotated[bool, typer.Option(help="write only clips with nothing wrong")] = False,
) -> Answer:
    """List every bad row of the clip table, and every clip whose files are not there or too short.

    \b
    Examples:
      karmma check --table clips.csv
      karmma check --write good.csv --only-good
    """
    from .data.check import check_clips

    table, bad = read_rows(settings.data, settings.data.heads)
    tell_some(table.notes)
    if settings.dry_run:
        more = f" and write {write}" if write else ""
        return would(f"Would open the files of {table.n_clips} clips{more}", clips=table.n_clips, bad_rows=len(bad))
    with watched("check", table.n_clips, "clips") as progress:
        bad += check_clips(table, settings.data, progress.advance)
    for row in bad:
        out.print(str(row), soft_wrap=True, markup=False, highlight=False)
    wrong = {row.clip_id for row in bad}
    if write is not None:
        kept = [clip_id not in wrong or not only_good for clip_id in table.clip_ids.tolist()]
        table.kept(np.array(kept)).write(write)
        tell(f"Wrote {write}; its paths start at {table.folder}.")
    n_clips = {split: len(table.rows(split)) for split in SPLITS}
    splits = ", ".join(f"{n} {split}" for split, n in n_clips.items())
    tell(f"{table.n_clips} clips ({splits}), {len(wrong)} with something wrong.")
    tell("Correct them and run karmma check again." if bad else "Next: karmma extract")
    return Answer({"clips": n_clips, "bad": bad, "written": write}, SOME_FAILED if bad else 0)
