"""A view: which moments and which crop of a clip a model sees, drawn from a seed alone."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import DataConfig

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class View:
    """One seeded sampling of a clip, the same for every modality."""

    index: int
    offsets: tuple[float, ...]  # T values in [0, 1): where in each of T equal spans of the clip the moment lies
    scale: float  # side of the square crop over the short side of the picture
    center: tuple[float, float]  # x, y of the crop as fractions 0..1 of the room it has to move
    flip: bool  # mirrored left to right


def draw_view(clip_id: str, view: int, data: DataConfig) -> View:
    """Return view `view` of a clip: 0 is the clean one, all others are drawn from (view seed, clip, view).

    The same in any process, in any order and with any version of NumPy.  Raises ValueError if `view` is negative.
    """
    if view < 0:
        raise ValueError(f"view = {view}, expected 0 (clean) or more")
    if view == 0:
        return View(0, (0.5,) * data.frames, data.center_crop, (0.5, 0.5), False)
    seed = f"{data.view_seed}/{view}/{clip_id}"
    shrink, x, y, mirror = _uniform(f"crop/{seed}", 4)
    return View(
        index=view,
        offsets=_uniform(f"time/{seed}", data.frames),
        scale=data.crop_min + (1 - data.crop_min) * shrink,
        center=(x, y),
        flip=data.flip and mirror < 0.5,
    )


def _uniform(seed: str, n: int) -> tuple[float, ...]:
    """Return n numbers in [0, 1), 53 bits each, as the bytes of SHAKE-256 give them."""
    stream = hashlib.shake_256(seed.encode()).digest(8 * n)
    return tuple((int.from_bytes(stream[i : i + 8], "little") >> 11) * 2.0**-53 for i in range(0, 8 * n, 8))


def view_times(view: View, start_s: float, stop_s: float) -> "np.ndarray":
    """Return the T moments of a clip in seconds, ascending, float64."""
    import numpy as np

    n_spans = len(view.offsets)
    return start_s + (np.arange(n_spans) + np.asarray(view.offsets)) * (stop_s - start_s) / n_spans


def crop_box(width: int, height: int, view: View) -> tuple[int, int, int]:
    """Return left, top and side, in whole pixels, of the view's crop of a picture."""
    side = max(1, round(view.scale * min(width, height)))
    return round(view.center[0] * (width - side)), round(view.center[1] * (height - side)), side


def crop(picture: "np.ndarray", view: View, size: int) -> "np.ndarray":
    """Cut the view's crop out of a picture [H, W, C] and resize it to [size, size, C], not mirrored, same dtype.

    Shrinking averages areas (no aliasing), growing interpolates linearly.
    """
    import cv2

    cv2.setNumThreads(1)  # many readers run side by side, and OpenCV's threads do not survive a fork
    left, top, side = crop_box(picture.shape[1], picture.shape[0], view)
    cut = picture[top : top + side, left : left + side]
    return cv2.resize(cut, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
