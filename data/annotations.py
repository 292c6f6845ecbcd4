"""Clip tables, held as Arrow columns: which clips there are, where their files lie, and what they are labelled."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import digest
from .errors import TableError, nearest
from .modality import MODALITIES
from .places import under
from .publish import publish

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val", "test")
# Modalities that may have a source of their own; the video's is the `video` column itself.
SOURCES = tuple(name for name in MODALITIES if name != "video")
# Column -> modality whose numbered frames (or bare samples) come at so many a second.
RATES = {"video_fps": "video", "flow_fps": "flow", "audio_hz": "audio"}
INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class Clip:
    """One labelled span of a video: a row of the table, with paths resolved.

    video: a media file, a folder of numbered frames, or `pack.h5::dataset`; sources alike, by modality: None where the
    cell is empty (absent by design), no key where there is no such column.  video_id: what boxes and packs call the
    video.  stop_s: None for the end of the video.  rates: modality -> numbered frames, or samples, a second.
    """

    clip_id: str
    video: Path
    start_s: float
    stop_s: float | None
    sources: Mapping[str, Path | None]
    video_id: str = ""
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ClipTable:
    """All clips of one table, row by row.

    clip_ids, split: [N] fixed-width unicode.  arrow: clip_id, video, start_s, stop_s (null: end of the file), split,
    and where the files have them video_id, participant, sources, rates (null: empty) and the heads (null: unlabelled).
    folder: where relative paths start.  class_names: head -> its classes in the order of their indices, where a data
    set fixes them.  unseen: participants that the data set keeps out of training; tail: head -> its rare classes.
    """

    path: Path
    heads: tuple[str, ...]
    arrow: "pa.Table"
    clip_ids: np.ndarray
    split: np.ndarray
    folder: Path
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unseen: frozenset[str] = frozenset()
    tail: Mapping[str, frozenset[str]] = field(default_factory=dict)
    is_pruned: bool = False  # whether clips of a noun that is never trained are to be left out
    notes: tuple[str, ...] = ()  # what the reader left out or moved, for the person at the terminal

    @property
    def n_clips(self) -> int:
        """Number of rows."""
        return len(self.clip_ids)

    def clip(self, row: int) -> Clip:
        """Return one clip; relative paths start at `folder`."""
        found = {name: values[0] for name, values in self.arrow.slice(int(row), 1).to_pydict().items()}
        files = {name: found[name] and under(self.folder, found[name]) for name in SOURCES if name in found}
        rates = {modality: found[name] for name, modality in RATES.items() if found.get(name)}
        video = under(self.folder, found["video"])
        video_id = found.get("video_id") or video.stem
        return Clip(found["clip_id"], video, found["start_s"], found["stop_s"], files, video_id, rates)

    def sources(self, row: int) -> list[Any]:
        """Return what a receipt digests: [clip_id, video, start_s, stop_s, {modality: path}, {rate: value}].

        Paths as written, so that data may move; rates only where the table has any.
        """
        return next(self.slice_sources(int(row), 1))

    def slice_sources(self, start: int = 0, n: int | None = None) -> Iterator[list[Any]]:
        """Yield `sources` of n rows from `start` on, by default of all, read column by column."""
        names = [name for name in SOURCES if name in self.arrow.column_names]
        rates = [name for name in RATES if name in self.arrow.column_names]
        part = self.arrow.select(["clip_id", "video", "start_s", "stop_s", *names, *rates]).slice(start, n)
        n_fixed = 4 + len(names)
        for row in zip(*(column.to_pylist() for column in part.columns), strict=True):
            said = [*row[:4], dict(zip(names, row[4:n_fixed], strict=True))]
            yield [*said, dict(zip(rates, row[n_fixed:], strict=True))] if rates else said

    def kept(self, rows: np.ndarray, *notes: str) -> "ClipTable":
        """Return the table with the rows where `rows` [N] is True."""
        ids, split = self.clip_ids[rows], self.split[rows]
        return replace(self, arrow=self.arrow.filter(rows), clip_ids=ids, split=split, notes=(*self.notes, *notes))

    def resplit(self, split: np.ndarray, note: str) -> "ClipTable":
        """Return the table with another split, [N] text."""
        import pyarrow as pa

        place = self.arrow.column_names.index("split")
        arrow = self.arrow.set_column(place, "split", pa.array(split.tolist()))
        return replace(self, arrow=arrow, split=split, notes=(*self.notes, note))

    def snapshot(self) -> list[str]:
        """Return each row's split and labels as JSON text, [N]: what a cache remembers to tell changes by."""
        columns = {name: self.arrow.column(name).to_pylist() for name in ("split", *self.heads)}
        return [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def write(self, path: Path) -> None:
        """Write the table as one's own kind, .csv or .parquet by the suffix; paths stay as they are, from `folder`.

        Raises TableError for another suffix.
        """
        import pyarrow as pa
        from pyarrow import csv, parquet

        kinds = {".csv": csv.write_csv, ".parquet": parquet.write_table}
        if path.suffix.lower() not in kinds:
            raise TableError(f"{path}: a clip table ends in .csv or .parquet. Choose another name.")
        sink = pa.BufferOutputStream()
        kinds[path.suffix.lower()](self.arrow, sink)
        publish(path, sink.getvalue().to_pybytes())

    def content_digest(self) -> str:
        """Return 16 hex digits over every clip, its sources, times, split and labels, in the table's order."""
        return digest(self.arrow.to_pydict())

    def participants(self) -> np.ndarray:
        """Return each row's participant, [N] text, '' where none is named."""
        named = "participant" in self.arrow.column_names
        texts = self.arrow.column("participant").to_pylist() if named else [None] * self.n_clips
        return np.array([text or "" for text in texts])

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

        A data set's own order, where it has one.  Else words are sorted, those that are numbers by value, and a column
        of integers holds indices: "0" to its largest.
        """
        if head in self.class_names:
            return self.class_names[head]
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
