"""EPIC-KITCHENS-100: the official annotation files in the columns of one's own tables."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import TableError
from .tables import TextTable, read_text_table

# Where the official download puts the videos, below EPIC-KITCHENS/.
VIDEOS = "{participant}/videos/{video_id}.MP4"
# Frames a second of released RGB and flow: the videos of 2018 have numbers of two digits, those of 2020 of three.
RATES_2018, RATES_2020 = ("60", "30"), ("50", "50")
TIME = re.compile(r"([0-9]+):([0-5][0-9]):([0-5][0-9](?:\.[0-9]+)?)")
NAMES = {
    "narration_id": "clip_id",
    "participant_id": "participant",
    "video_id": "video_id",
    "start_timestamp": "start_s",
    "stop_timestamp": "stop_s",
}
HEADS = ("verb", "noun")


def is_epic(header: Sequence[str]) -> bool:
    """Say whether a table is an official one, by its header."""
    return "narration_id" in header


def read_epic(path: Path, heads: tuple[str, ...], folder: Path) -> tuple[TextTable, dict[str, Any]]:
    """Return the rows of an official file in the columns of one's own tables, and what the data set fixes.

    folder: where the other official files are.  Labels are the names of the official classes, in their order,
    where EPIC_100_verb_classes.csv and EPIC_100_noun_classes.csv lie there, else class indices; a file without label
    columns is unlabelled.
    Facts are fields of ClipTable, and `video_files`.  Raises TableError for heads that the data set does not have.
    """
    unknown = [head for head in heads if head not in HEADS]
    if unknown:
        raise TableError(f"{path}: EPIC-KITCHENS has the heads verb and noun, asked for {unknown[0]}. Set heads.")
    text = read_text_table(path, (*NAMES, *(f"{head}_class" for head in heads)))
    missing = [name for name in NAMES if name not in text.columns]
    if missing:
        raise TableError(f"{path}: no column {missing[0]!r}, which EPIC-KITCHENS' files have. Fetch the file again.")
    classes = {head: names for head in heads if (names := _classes(folder / f"EPIC_100_{head}_classes.csv"))}
    columns = {own: text.columns[official] for official, own in NAMES.items()}
    for name in ("start_s", "stop_s"):
        columns[name] = [_seconds(cell) for cell in columns[name]]
    rates = [RATES_2020 if len(video.partition("_")[2]) == 3 else RATES_2018 for video in columns["video_id"]]
    columns["video_fps"], columns["flow_fps"] = map(list, zip(*rates, strict=True)) if rates else ([], [])
    bad = dict(text.bad)
    for head in heads:
        if f"{head}_class" in text.columns:
            columns[head] = _labels(head, text, classes.get(head), bad)
    facts = {
        "video_files": VIDEOS,
        "is_pruned": True,
        "class_names": classes,
        "unseen": frozenset(_column(folder / "EPIC_100_unseen_participant_ids_validation.csv", "participant_id")),
        "tail": {head: _tail(folder / f"EPIC_100_tail_{head}s.csv", head, classes.get(head)) for head in heads},
    }
    return TextTable([*columns], columns, text.lines, text.unit, bad), facts


def _seconds(cell: str) -> str:
    """Turn 00:01:23.45 into 83.45; anything else stays as it is, for the checker to name."""
    match = TIME.fullmatch(cell)
    if match is None:
        return cell
    hours, minutes, seconds = match.groups()
    return repr(round(3600 * int(hours) + 60 * int(minutes) + float(seconds), 6))


def _labels(head: str, text: TextTable, names: tuple[str, ...] | None, bad: dict[int, str]) -> list[str]:
    """Return the class names of a column of indices; note indices that no class has."""
    cells = text.columns[f"{head}_class"]
    if names is None:
        return cells
    known = {str(index): name for index, name in enumerate(names)} | {"": ""}
    for line, cell in zip(text.lines, cells, strict=True):
        if cell not in known:
            bad.setdefault(line, f"{head}_class = {cell}, expected 0 to {len(names) - 1}")
    return [known.get(cell, "") for cell in cells]


def _column(path: Path, name: str) -> list[str]:
    """Return a column of a file beside the table; empty if there is no such file."""
    if not path.exists():
        return []
    text = read_text_table(path, (name,))
    if name not in text.columns:
        raise TableError(f"{path}: no column {name!r}. Fetch the file again.")
    return text.columns[name]


def _classes(path: Path) -> tuple[str, ...]:
    """Return the official class names in the order of their ids."""
    ids, names = _column(path, "id"), _column(path, "key")
    if ids != [str(index) for index in range(len(ids))] or len(set(names)) != len(names):
        raise TableError(f"{path}: expected ids 0, 1, 2, ... and distinct keys. Fetch the file again.")
    return tuple(names)


def _tail(path: Path, head: str, names: tuple[str, ...] | None) -> frozenset[str]:
    indices = _column(path, head)
    return frozenset(indices if names is None else (names[int(index)] for index in indices))
