"""Clip tables: one's own CSV or Parquet, checked row by row and held as Arrow columns."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import digest
from .errors import TableError, nearest
from .modality import MODALITIES
from .tables import TextTable, read_text_table

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val", "test")
REQUIRED = ("clip_id", "video")
# Modalities that may have a file of their own; the video's file is the `video` column itself.
SOURCES = tuple(name for name in MODALITIES if name != "video")
OPTIONAL = ("start_s", "stop_s", "split", "participant", *SOURCES)
N_SHOWN = 5
# Integer labels are class indices; a larger one is an identifier that strayed into a label column.
MAX_CLASSES = 100_000
INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class Clip:
    """One labelled span of a video: a row of the table, with paths resolved.

    stop_s: None for the end of the file.  sources: modality -> its own file; None where the column is there but the
    cell is empty (absent by design); no key where there is no such column.
    """

    clip_id: str
    video: Path
    start_s: float
    stop_s: float | None
    sources: Mapping[str, Path | None]


@dataclass(frozen=True, eq=False)
class ClipTable:
    """All clips of one table, row by row.

    clip_ids, split: [N] fixed-width unicode.  arrow: clip_id, video, start_s, stop_s (null: end of the file), split,
    participant and source columns (null: empty) where the file has them, and the heads (null: unlabelled).
    """

    path: Path
    heads: tuple[str, ...]
    arrow: "pa.Table"
    clip_ids: np.ndarray
    split: np.ndarray

    @property
    def n_clips(self) -> int:
        """Number of rows."""
        return len(self.clip_ids)

    def clip(self, row: int) -> Clip:
        """Return one clip; relative paths are relative to the table's folder."""
        clip_id, video, start_s, stop_s, own = self.sources(row)
        folder = self.path.parent
        files = {name: None if written is None else folder / written for name, written in own.items()}
        return Clip(clip_id, folder / video, start_s, stop_s, files)

    def sources(self, row: int) -> list[Any]:
        """Return what a receipt digests: [clip_id, video, start_s, stop_s, {modality: path}], paths as written."""
        return next(self.slice_sources(int(row), 1))

    def slice_sources(self, start: int = 0, n: int | None = None) -> Iterator[list[Any]]:
        """Yield `sources` of n rows from `start` on, by default of all, read column by column."""
        names = [name for name in SOURCES if name in self.arrow.column_names]
        part = self.arrow.select(["clip_id", "video", "start_s", "stop_s", *names]).slice(start, n)
        for row in zip(*(column.to_pylist() for column in part.columns), strict=True):
            yield [*row[:4], dict(zip(names, row[4:], strict=True))]

    def snapshot(self) -> list[str]:
        """Return each row's split and labels as JSON text, [N]: what a cache remembers to tell changes by."""
        columns = {name: self.arrow.column(name).to_pylist() for name in ("split", *self.heads)}
        return [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def content_digest(self) -> str:
        """Return 16 hex digits over every clip, its sources, times, split and labels, in the table's order."""
        return digest(self.arrow.to_pydict())

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of a split, int64, ascending; raise TableError for a name that is no split."""
        if split not in SPLITS:
            raise TableError(f"Unknown split {split!r}. {nearest(split, SPLITS)}")
        return np.flatnonzero(self.split == split).astype(np.int64)

    def _texts(self, head: str) -> list[str | None]:
        if head not in self.heads:
            raise TableError(f"{self.path}: no head {head!r} was read. {nearest(head, self.heads)}")
        return self.arrow.column(head).to_pylist()

    def classes(self, head: str) -> tuple[str, ...]:
        """Return the class names of a head, in the order of their indices, over all splits.

        Words are sorted, those that are numbers by value.  A column of integers holds indices: "0" to its largest.
        """
        known = {text for text in self._texts(head) if text is not None}
        if known and all(map(INTEGER.fullmatch, known)):
            return tuple(map(str, range(max(map(int, known)) + 1)))
        return tuple(sorted(known, key=lambda text: (0, int(text), "") if text.isdecimal() else (1, 0, text)))

    def labels(self, head: str, classes: tuple[str, ...] | None = None) -> np.ndarray:
        """Return the class index of each row, int64 [N], -1 where the cell is empty.

        classes: the names a run was trained with; by default the table's own.  Raises TableError for a label that is
        not among them.
        """
        names = self.classes(head) if classes is None else classes
        index: dict[str | None, int] = {name: place for place, name in enumerate(names)} | {None: -1}
        texts = self._texts(head)
        try:
            return np.fromiter((index[text] for text in texts), np.int64, len(texts))
        except KeyError as error:
            label = str(error.args[0])
            row = texts.index(label)
            raise TableError(
                f"{self.path}: clip {str(self.clip_ids[row])!r} has the {head} {label!r}, which the run does not know. "
                f"{nearest(label, names)}"
            ) from None


def read_clip_table(path: Path, heads: tuple[str, ...]) -> ClipTable:
    """Read and check a clip table, CSV or Parquet by its suffix; media files are not looked at.

    Columns: clip_id and video (required); start_s, stop_s in seconds (empty stop: the whole file); split (train, val
    or test; empty: train); participant; audio, flow, detections (files of their own); and the heads.  Others are left
    alone.  Raises one TableError that counts all bad rows and shows the first five with line and reason.
    """
    path = Path(path)
    text = read_text_table(path, dict.fromkeys((*REQUIRED, *OPTIONAL, *heads)))
    missing = [name for name in (*REQUIRED, *heads) if name not in text.columns]
    if missing:
        hints = (f"no column {name!r}. {nearest(name, text.header)}" for name in missing)
        raise TableError(f"{path}: {'  '.join(hints)}")
    if not text.lines and not text.bad:
        raise TableError(f"{path}: no rows below the header. A clip table needs at least one clip.")
    bad = dict(text.bad)
    values = _checked(text, heads, bad)
    if bad:
        shown = [f"{text.unit} {line}: {bad[line]}" for line in sorted(bad)[:N_SHOWN]]
        rest = f"; and {len(bad) - N_SHOWN} more" if len(bad) > N_SHOWN else ""
        count = f"{len(bad)} bad row{'s' * (len(bad) > 1)}"
        raise TableError(f"{path}: {count}: {'; '.join(shown)}{rest}. Correct them and run again.")
    return _build(path, heads, values)


def _checked(text: TextTable, heads: tuple[str, ...], bad: dict[int, str]) -> dict[str, list[Any]]:
    """Return the columns as values, with None for empty cells; note every bad row in `bad`: line -> first reason."""
    lines, empty, notes = text.lines, [""] * len(text.lines), []
    values: dict[str, list[Any]] = {
        "clip_id": _distinct(text.columns["clip_id"], lines, notes),
        "video": text.columns["video"],
    }
    notes += [(line, "video is empty") for line, video in zip(lines, values["video"], strict=True) if not video]
    starts = _seconds("start_s", text.columns.get("start_s", empty), lines, notes)
    values["start_s"] = [0.0 if start is None else start for start in starts]
    values["stop_s"] = _seconds("stop_s", text.columns.get("stop_s", empty), lines, notes)
    for line, start, stop in zip(lines, values["start_s"], values["stop_s"], strict=True):
        if stop is not None and stop <= start:
            notes.append((line, f"stop_s = {stop:g} is not after start_s = {start:g}"))
    values["split"] = [split or "train" for split in text.columns.get("split", empty)]
    unknown = {*values["split"]} - {*SPLITS}
    for line, split in zip(lines, values["split"], strict=True):
        if split in unknown:
            notes.append((line, f"unknown split {split!r}, expected {', '.join(SPLITS)}"))
    for name in ("participant", *SOURCES):
        if name in text.columns:
            values[name] = [cell or None for cell in text.columns[name]]
    for head in heads:
        values[head] = _labels(head, text.columns[head], lines, notes)
    for line, reason in notes:
        bad.setdefault(line, reason)
    return values


def _distinct(ids: list[str], lines: list[int], notes: list[tuple[int, str]]) -> list[str]:
    first: dict[str, int] = {}
    for line, clip_id in zip(lines, ids, strict=True):
        if not clip_id:
            notes.append((line, "clip_id is empty"))
        elif first.setdefault(clip_id, line) != line:
            notes.append((line, f"clip_id {clip_id!r} is taken by line {first[clip_id]}"))
    return ids


def _seconds(name: str, texts: list[str], lines: list[int], notes: list[tuple[int, str]]) -> list[float | None]:
    """Return times in seconds, None where the cell is empty or bad."""
    out: list[float | None] = []
    for line, text in zip(lines, texts, strict=True):
        try:
            value = float(text) if text else None
        except ValueError:
            value = math.nan
        if value is not None and not 0 <= value < math.inf:
            notes.append((line, f"{name} = {text!r}, expected seconds, 0 or more"))
            value = None
        out.append(value)
    return out


def _labels(head: str, texts: list[str], lines: list[int], notes: list[tuple[int, str]]) -> list[str | None]:
    """Return labels as text; integers, if the column holds nothing else, in their plain form ('07' as '7')."""
    known = {text for text in texts if text}
    if not known or not all(map(INTEGER.fullmatch, known)):
        return [text or None for text in texts]
    plain: dict[str, str | None] = {text: str(int(text)) for text in known} | {"": None}
    wrong = {text for text in known if not 0 <= int(text) < MAX_CLASSES}
    for line, text in zip(lines, texts, strict=True):
        if text in wrong:
            notes.append((line, f"{head} = {text}, expected a class index from 0, or an empty cell for no label"))
    return [plain[text] for text in texts]


def _build(path: Path, heads: tuple[str, ...], values: Mapping[str, list[Any]]) -> ClipTable:
    import pyarrow as pa

    types = dict.fromkeys(("start_s", "stop_s"), pa.float64())
    arrow = pa.table({name: pa.array(column, types.get(name, pa.string())) for name, column in values.items()})
    return ClipTable(path, heads, arrow, np.array(values["clip_id"]), np.array(values["split"]))
