"""Detections: boxes of hands and objects from JSON in the form of Something-Else, mapped into a view's crop.

Three forms are read: a list of frames; `{"fps", "width", "height", "frames": [...]}`; and the official file of many
videos, `{video id: [frames]}`.  A frame is `{"name": "<video>/0001.jpg", "labels": [...]}`; its number, counted from 1,
is taken from the name, or else from its place.  A label is `{"box2d": {"x1", "y1", "x2", "y2"} in pixels,
"standard_category": "hand" or another, "score" (default 1)}`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .errors import MediaError
from .media import EPSILON_S
from .views import View, crop_square

# Something-Something V2, on which the official files rest, has 12 frames a second; they do not say so.
OFFICIAL_FPS = 12.0
HAND, OBJECT = 1, 2


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

    Raises MediaError if the file is missing or not in one of the three forms.
    """
    content = _read_json(path)
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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MediaError(f"{path}: not boxes in the form of Something-Else: {error!r}. Correct the file.") from None
    if not fps > 0 or (size is not None and min(size) < 1):
        raise MediaError(f"{path}: fps = {fps}, size = {size}, expected positive numbers. Correct the file.")
    return Boxes(path, fps, size, numbered)


def _read_json(path: Path) -> Any:
    try:
        stamp = path.stat()
        return _parsed(path, stamp.st_mtime_ns, stamp.st_size)
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file. Put it there, or correct the clip table.") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be read as JSON: {error}. Fetch it again.") from None


@lru_cache(maxsize=2)
def _parsed(path: Path, _mtime: int, _size: int) -> Any:
    """Parse a file; the last two stay in memory, since the official ones hold many videos."""
    return json.loads(path.read_bytes())


def _number(frame: Mapping[str, Any], place: int) -> int:
    stem = PurePosixPath(frame.get("name", "")).stem
    return int(stem) - 1 if stem.isdecimal() else place


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
    if not np.isfinite(table).all():
        raise ValueError("a box or score that is not a finite number")
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
