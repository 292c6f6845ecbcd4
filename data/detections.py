"""Detections: boxes of hands and objects from JSON in the form of Something-Else, mapped into a view's crop.

Three forms are read: a list of frames; `{"fps", "width", "height", "frames": [...]}`; and the official file of many
videos, `{video id: [frames]}`.  A frame is `{"name": "<video>/0001.jpg", "labels": [...]}`; its number, counted from 1,
is taken from the name, or else from its place.  A label is `{"box2d": {"x1", "y1", "x2", "y2"} in pixels,
"standard_category": "hand" or another, "score" (default 1)}`.

The official file comes in parts, named together by a path with `*`.  Each holds the boxes of some 45,000 videos: which
bytes are whose is noted in one pass, and only a video's own bytes are ever parsed.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from mmap import ACCESS_READ, mmap
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .errors import MediaError
from .media import EPSILON_S
from .places import StoredFile, is_local, matches, read_bytes, storage_errors
from .views import View, crop_square

# Something-Something V2, on which the official files rest, has 12 frames a second; they do not say so.
OFFICIAL_FPS = 12.0
HAND, OBJECT = 1, 2
# A key with a list: a video, unless it is one of the lists that a frame has.
LIST = re.compile(rb'"([^"\\]+)"\s*:\s*\[')
FRAME_LISTS = (b"labels", b"gt_placeholders")
MOST = 1e6  # frames a second, and pixels a side: what is more is no number of a video
MOST_DIGITS = 12  # of a frame's number


@dataclass(frozen=True)
class Boxes:
    """The annotated frames of one video: number from 0 -> float64 [n, 6], x1, y1, x2, y2 in pixels, score, category."""

    path: Path
    fps: float
    size: tuple[int, int] | None
    frames: Mapping[int, np.ndarray]

    def duration_s(self) -> float:
        """Seconds up to the end of the last annotated frame."""
        return (max(self.frames, default=-1) + 1) / self.fps


def read_boxes(path: Path, names: Sequence[str]) -> Boxes | None:
    """Read the boxes of the video that goes by one of `names`; None if the file holds other videos only.

    path: one file, or with `*` those of its parts.  Raises MediaError if a file is missing or not in one of
    the three forms, or if two parts hold the video.
    """
    parts = matches(path) if "*" in str(path) else [path]
    if not parts:
        raise MediaError(f"{path}: no such files. Put them there, or correct detections_files.")
    found = [boxes for part in parts if (boxes := _read_part(part, names)) is not None]
    if len(found) > 1:
        raise MediaError(f"{found[0].path} and {found[1].path}: both have boxes of {names[0]}. Remove one of them.")
    return found[0] if found else None


def _read_part(path: Path, names: Sequence[str]) -> Boxes | None:
    content = _read_json(path, names)
    head: Mapping[str, Any] = {}
    try:
        if isinstance(content, dict) and "frames" in content:
            head, frames = content, content["frames"]
        elif isinstance(content, dict):
            known = [name for name in names if name in content]
            if not known:
                return None
            frames = content[known[0]]
        else:
            frames = content
        size = (int(head["width"]), int(head["height"])) if "width" in head else None
        numbered = {_number(frame, place): _rows(frame) for place, frame in enumerate(frames)}
        fps = float(head.get("fps", OFFICIAL_FPS))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise MediaError(f"{path}: not boxes in the form of Something-Else: {error!r}. Correct the file.") from None
    if not 0 < fps < MOST or (size is not None and not 0 < min(size) <= max(size) < MOST):
        raise MediaError(f"{path}: fps = {fps:g}, size = {size}, expected positive numbers. Correct the file.")
    return Boxes(path, fps, size, numbered)


def _read_json(path: Path, names: Sequence[str]) -> Any:
    """Return the content of a file; of a file of many videos, an object with those of `names`."""
    try:
        stamp = path.stat()
        version = (path, stamp.st_mtime_ns, stamp.st_size)
        places = _places(*version)
        if not places or "frames" in places:
            return _parsed(*version)
        try:
            return {name: _slice(path, *places[name]) for name in names if name in places}
        except ValueError:  # not quite the official form, but perhaps one of the three
            return _parsed(*version)
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file. Put it there, or correct the clip table.") from None
    except MediaError:
        raise
    except storage_errors(ValueError, RecursionError) as error:
        raise MediaError(f"{path}: cannot be read as JSON: {error}. Fetch it again.") from None


@lru_cache(maxsize=2)
def _parsed(path: Path, _mtime: int, _size: int) -> Any:
    """Parse a file whole; the last two stay in memory, since many clips may share them."""
    return json.loads(read_bytes(path))


@lru_cache(maxsize=16)
def _places(path: Path, _mtime: int, size: int) -> dict[str, tuple[int, int]]:
    """Return for each video of a file of many the bytes that hold its list; {} for a file of another form.

    Found by the look of a key before a list; only a key of a frame looks the same, and a slice that is cut at one that
    is not known does not parse.
    """
    if not size:
        return {}
    with _whole(path) as content:
        if not bytes(content[:64]).lstrip().startswith(b"{"):
            return {}
        keys = [m for m in LIST.finditer(content) if m[1] not in FRAME_LISTS]
        # What is no UTF-8 is nobody's name; an error here would leave the map in use, and it could not be closed.
        found = [(m[1].decode(errors="replace"), m.start(), m.end() - 1) for m in keys]
        del keys
    ends = [start for _, start, _ in found[1:]] + [size]
    places = {name: (start, end) for (name, _, start), end in zip(found, ends, strict=True)}
    return places if len(places) == len(found) else {}


def _whole(path: Path) -> AbstractContextManager[mmap | memoryview]:
    """Return all bytes of a file, mapped where it is a local one."""
    if not is_local(path):
        return memoryview(read_bytes(path))
    with open(path, "rb") as file:
        return mmap(file.fileno(), 0, access=ACCESS_READ)


def _slice(path: Path, start: int, end: int) -> Any:
    """Parse the list that starts at a byte of a file and ends before another; raises ValueError if it does not."""
    with open(path, "rb") if is_local(path) else StoredFile(path) as file:
        file.seek(start)
        text = file.read(end - start).decode()
    value, stop = json.JSONDecoder().raw_decode(text)
    if text[stop:].strip() not in (",", "}"):
        raise ValueError(f"unexpected {text[stop : stop + 20]!r} after a list")
    return value


def _number(frame: Mapping[str, Any], place: int) -> int:
    stem = PurePosixPath(frame.get("name", "")).stem
    return int(stem) - 1 if stem.isdecimal() and len(stem) <= MOST_DIGITS else place


def _rows(frame: Mapping[str, Any]) -> np.ndarray:
    """Return the boxes of one frame, float64 [n, 6], the best scores first (equal ones in the file's order)."""
    rows = [
        (
            *(float(label["box2d"][side]) for side in ("x1", "y1", "x2", "y2")),
            float(label.get("score", 1.0)),
            HAND if label.get("standard_category") == "hand" else OBJECT,
        )
        for label in frame.get("labels", ())
    ]
    table = np.array(rows, np.float64).reshape(-1, 6)
    if not (np.abs(table) < MOST**2).all():
        raise ValueError("a box or score that is not a finite number, or beyond any picture")
    return table[np.argsort(-table[:, 4], kind="stable")]


def place_boxes(
    boxes: Boxes, times: np.ndarray, view: View, max_boxes: int, picture_size: Callable[[], tuple[int, int]]
) -> np.ndarray:
    """Return the boxes on display at each time in the view's crop, float32 [T, max_boxes, 6].

    x1, y1, x2, y2 in 0..1 of the crop, cut off at its edges; score; category 1 hand, 2 object; rows of category 0
    hold no box.  Boxes wholly outside the crop are left out.  A frame without boxes, or after the last annotated one,
    has none.  picture_size: width and height of the upright video, asked only where the file does not say.
    """
    width, height = boxes.size or picture_size()
    left, top, side = crop_square(width, height, view)
    out = np.zeros((len(times), max_boxes, 6), np.float32)
    for step, time in enumerate(times):
        rows = boxes.frames.get(int((time + EPSILON_S) * boxes.fps))
        if rows is None:
            continue
        corners = np.clip((rows[:, :4] - (left, top, left, top)) / side, 0, 1)
        if view.flip:
            corners = np.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], axis=1)
        seen = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
        kept = np.hstack([corners, np.clip(rows[:, 4:5], 0, 1), rows[:, 5:]])[seen][:max_boxes]
        out[step, : len(kept)] = kept
    return out


def has_boxes(boxes: Boxes, start_s: float, stop_s: float) -> bool:
    """Say whether any frame on display between start and stop has a box, whatever the view."""
    first, last = int((start_s + EPSILON_S) * boxes.fps), stop_s * boxes.fps
    return any(first <= number < last and len(rows) for number, rows in boxes.frames.items())
