"""Reading clip tables: one's own, EPIC-KITCHENS-100 or Something-Something V2, all checked row by row in one way."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .annotations import INTEGER, RATES, SOURCES, SPLITS, ClipTable
from .config import DataConfig
from .epic import is_epic, read_epic
from .errors import ConfigError, TableError, nearest, printable
from .places import place
from .something import read_something
from .splits import hold_out, prune
from .tables import TextTable, read_text_table

N_SHOWN = 5
# Integer labels are class indices; a larger one is an identifier that strayed into a label column.
MAX_CLASSES = 100_000
# Three years of seconds: what is more is milliseconds, or a date that strayed into a column of times.
LARGEST = 1e8
COLUMNS = ("clip_id", "video", "video_id", "start_s", "stop_s", "split", "participant", *SOURCES, *RATES)


@dataclass(frozen=True)
class BadRow:
    """A row of a table that cannot be used, and why; `unit` says what `line` counts: lines of a CSV, else rows."""

    path: Path
    unit: str
    line: int
    clip_id: str
    reason: str

    def __str__(self) -> str:
        """Return it as one line."""
        return printable(f"{self.path}, {self.unit} {self.line}, {self.clip_id or 'no clip_id'}: {self.reason}")


def read_clip_table(path: Path, heads: tuple[str, ...]) -> ClipTable:
    """Read and check one table of one's own; see `read_clips`."""
    return read_clips(DataConfig(table=path, heads=heads))


def read_clips(data: DataConfig, heads: tuple[str, ...] = ()) -> ClipTable:
    """Read data.table, val_table and test_table as one checked table; media files are not looked at.

    Columns of one's own CSV or Parquet: docs/clips.md.  heads: label columns, by default those of `data`.
    Raises one TableError that counts all bad rows and shows the first five with line and reason.
    """
    table, bad = read_rows(data, heads)
    if bad:
        shown = "; ".join(f"{row.unit} {row.line}: {row.reason}" for row in bad[:N_SHOWN])
        rest = f"; and {len(bad) - N_SHOWN} more" if len(bad) > N_SHOWN else ""
        count = f"{len(bad)} bad row{'s' * (len(bad) > 1)}"
        raise TableError(f"{bad[0].path}: {count}: {shown}{rest}. Correct them and run again.")
    return table


def read_rows(data: DataConfig, heads: tuple[str, ...] = ()) -> tuple[ClipTable, list[BadRow]]:
    """Return the table of all good rows, and the bad rows, in the order of the files."""
    heads = heads or data.heads
    if data.table is None:
        raise ConfigError("No clip table named. Add [data] table = ... to karmma.toml, or use --table.")
    held_out = "val" if data.holdout == "none" else "test"
    files = [(data.table, "train"), (data.val_table, held_out), (data.test_table, "test")]
    rows = _Rows(data, data.table, heads)
    for path, split in files:
        if path is not None:
            rows.add(Path(path), split)
    table = rows.table()
    if data.holdout != "none":
        table = hold_out(table, data)
    return (prune(table) if data.prune else table), rows.bad


class _Rows:
    """The rows of all files of one table: good ones as columns, bad ones with their reasons."""

    def __init__(self, data: DataConfig, path: Path, heads: tuple[str, ...]) -> None:
        self.data, self.path, self.heads = data, path, heads
        self.bad: list[BadRow] = []
        self._parts: list[dict[str, list[Any]]] = []
        self._facts: dict[str, Any] = {}
        self._seen: dict[str, tuple[Path, int]] = {}

    def add(self, path: Path, split: str) -> None:
        """Check the rows of a file; `split` is what they are where they do not say so themselves."""
        text, facts = self._text(path, split)
        self._facts = facts | self._facts  # the training table's own facts come first
        if not text.lines and not text.bad:
            raise TableError(f"{path}: no rows below the header. A clip table needs at least one clip.")
        notes = list(text.bad.items())
        values: dict[str, list[Any]] = {"clip_id": self._distinct(path, text, notes)}
        values |= _sources(text, self.data, facts.get("video_files"), notes)
        values |= _spans(text, notes)
        values["split"] = _splits(text, split, notes)
        for name in ("participant", "video_id"):
            if name in text.columns:
                values[name] = [cell or None for cell in text.columns[name]]
        for name in RATES:
            stated = getattr(self.data, name)
            if stated is not None or name in text.columns:
                cells = _seconds(name, _cells(text, name), text.lines, notes)
                values[name] = cells if stated is None else [stated] * len(cells)
        for head in self.heads:
            values[head] = _labels(head, _cells(text, head), text.lines, notes)
        self._keep(path, text, values, notes)

    def _text(self, path: Path, split: str) -> tuple[TextTable, dict[str, Any]]:
        """Return the rows of a file in the columns of one's own tables, and what its data set fixes for all."""
        if path.suffix.lower() == ".json":
            return read_something(path, self.data.labels, self.heads)
        text = read_text_table(path, (*COLUMNS, *self.heads))
        if is_epic(text.header):
            return read_epic(path, self.heads, self.path.parent)
        # A table of clips to predict need not have labels.
        needed = ("clip_id",) if path == self.data.test_table and split == "test" else ("clip_id", *self.heads)
        missing = [name for name in needed if name not in text.columns]
        if missing:
            hints = (f"no column {name!r}. {nearest(name, text.header)}" for name in missing)
            raise TableError(f"{path}: {'  '.join(hints)}")
        return text, {}

    def _distinct(self, path: Path, text: TextTable, notes: list[tuple[int, str]]) -> list[str]:
        ids = text.columns["clip_id"]
        for line, clip_id in zip(text.lines, ids, strict=True):
            if not clip_id:
                notes.append((line, "clip_id is empty"))
                continue
            if "\0" in clip_id:  # which arrays of text lose at an end
                notes.append((line, f"clip_id {clip_id!r} holds a NUL character"))
                continue
            other, at = self._seen.setdefault(clip_id, (path, line))
            if (other, at) != (path, line):
                where = "" if other == path else f" of {other.name}"
                notes.append((line, f"clip_id {clip_id!r} is taken by {text.unit} {at}{where}"))
        return ids

    def _keep(self, path: Path, text: TextTable, values: dict[str, list[Any]], notes: list[tuple[int, str]]) -> None:
        reasons: dict[int, str] = {}
        for line, reason in notes:
            reasons.setdefault(line, reason)
        if reasons:
            ids = dict(zip(text.lines, values["clip_id"], strict=True))
            self.bad += [BadRow(path, text.unit, at, ids.get(at, ""), reasons[at]) for at in sorted(reasons)]
            good = [at for at, line in enumerate(text.lines) if line not in reasons]
            values = {name: [column[at] for at in good] for name, column in values.items()}
        self._parts.append(values)

    def table(self) -> ClipTable:
        """Return the good rows of all files as one table."""
        types = dict.fromkeys(("start_s", "stop_s", *RATES), pa.float64())
        parts = [
            pa.table({name: pa.array(column, types.get(name, pa.string())) for name, column in part.items()})
            for part in self._parts
        ]
        arrow = pa.concat_tables(parts, promote_options="default").combine_chunks()
        ids, split = (np.array(arrow.column(name).to_pylist(), str) for name in ("clip_id", "split"))
        facts = {name: value for name, value in self._facts.items() if name != "video_files"}
        folder = place(self.data.media or self.path.parent)
        return ClipTable(self.path, self.heads, arrow, ids, split, folder, **facts)


def _cells(text: TextTable, name: str) -> list[str]:
    return text.columns.get(name) or [""] * len(text.lines)


def _sources(
    text: TextTable, data: DataConfig, usual: str | None, notes: list[tuple[int, str]]
) -> dict[str, list[str | None]]:
    """Return the sources of all modalities as written, from the columns or, where there is none, from patterns."""
    patterns = {name: getattr(data, f"{name}_files") for name in ("video", *SOURCES)}
    patterns["video"] = patterns["video"] or usual
    fields = []
    if any(pattern and name not in text.columns for name, pattern in patterns.items()):
        named = zip(_cells(text, "video_id"), _cells(text, "video"), strict=True)
        ids = [video_id or Path(video).stem for video_id, video in named]
        fields = list(zip(ids, _cells(text, "participant"), text.columns["clip_id"], strict=True))
    out: dict[str, list[str | None]] = {}
    for name, pattern in patterns.items():
        if name in text.columns:
            out[name] = [cell or None for cell in text.columns[name]]
        elif pattern is not None:
            out[name] = [_filled(pattern, *row) for row in fields]
    if "video" not in out:
        raise TableError(
            f"no column 'video'. {nearest('video', text.header)} Or name the column video_id, and set video_files."
        )
    for line, video in zip(text.lines, out["video"], strict=True):
        if video is None:
            notes.append((line, f"{'video' if 'video' in text.columns else 'video_id'} is empty"))
    return out


def _filled(pattern: str, video_id: str, participant: str, clip_id: str) -> str | None:
    if not video_id and "{video_id}" in pattern:
        return None
    filled = pattern.replace("{video_id}", video_id).replace("{participant}", participant)
    return filled.replace("{clip_id}", clip_id)


def _spans(text: TextTable, notes: list[tuple[int, str]]) -> dict[str, list[float | None]]:
    stated = _seconds("start_s", _cells(text, "start_s"), text.lines, notes)
    stops = _seconds("stop_s", _cells(text, "stop_s"), text.lines, notes)
    starts = [0.0 if start is None else start for start in stated]
    for line, start, stop in zip(text.lines, starts, stops, strict=True):
        if stop is not None and stop <= start:
            notes.append((line, f"stop_s = {stop:g} is not after start_s = {start:g}"))
    return {"start_s": [*starts], "stop_s": stops}


def _splits(text: TextTable, split: str, notes: list[tuple[int, str]]) -> list[str]:
    found = [cell or split for cell in _cells(text, "split")]
    unknown = {*found} - {*SPLITS}
    for line, cell in zip(text.lines, found, strict=True):
        if cell in unknown:
            notes.append((line, f"unknown split {cell!r}, expected {', '.join(SPLITS)}"))
    return found


def _seconds(name: str, texts: list[str], lines: list[int], notes: list[tuple[int, str]]) -> list[float | None]:
    """Return times in seconds, or rates (which must not be 0), None where the cell is empty or bad."""
    out: list[float | None] = []
    for line, text in zip(lines, texts, strict=True):
        try:
            value = float(text) if text else None
        except ValueError:
            value = math.nan
        if value is not None and not (0 <= value < LARGEST and (value or name not in RATES)):
            kind = "a number above 0" if name in RATES else "seconds, 0 or more"
            notes.append((line, f"{name} = {text!r}, expected {kind}"))
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
