"""A view: which moments and which crop of a clip a model sees, drawn from a seed alone."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import DataConfig
from .errors import MediaError

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
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels: all that the view may show
    color: tuple[float, float, float] = (1.0, 1.0, 1.0)  # factors of brightness, contrast and saturation; video only
    masked_mels: tuple[float, float] = (0.0, 0.0)  # start and width, as shares of the mel bins; audio only
    masked_time: tuple[float, float] = (0.0, 0.0)  # start and width, as shares of the clip; audio only


def draw_view(clip_id: str, view: int, data: DataConfig) -> View:
    """Return view `view` of a clip: 0 is the clean one, all others are drawn from (view seed, clip, view).

    The same in any process, in any order and with any version of NumPy.  Raises ValueError if `view` is negative.
    """
    if view < 0:
        raise ValueError(f"view = {view}, expected 0 (clean) or more")
    if view == 0:
        return View(0, (0.5,) * data.frames, data.center_crop, (0.5, 0.5), False, data.crop_box)
    seed = f"{data.view_seed}/{view}/{clip_id}"
    shrink, x, y, mirror = _uniform(f"crop/{seed}", 4)
    jitter = (1 + data.color_jitter * (2 * share - 1) for share in _uniform(f"color/{seed}", 3))
    brightness, contrast, saturation = jitter
    return View(
        index=view,
        offsets=_uniform(f"time/{seed}", data.frames),
        scale=data.crop_min + (1 - data.crop_min) * shrink,
        center=(x, y),
        flip=data.flip and mirror < 0.5,
        box=data.crop_box,
        color=(brightness, contrast, saturation),
        masked_mels=_span(data.audio_mask, *_uniform(f"mels/{seed}", 2)),
        masked_time=_span(data.audio_mask, *_uniform(f"hush/{seed}", 2)),
    )


def _span(most: float, width: float, place: float) -> tuple[float, float]:
    """Return start and width of a part of 0..1, at most `most` wide, anywhere within it."""
    return place * (1 - most * width), most * width


def _uniform(seed: str, n: int) -> tuple[float, ...]:
    """Return n numbers in [0, 1), 53 bits each, as the bytes of SHAKE-256 give them."""
    stream = hashlib.shake_256(seed.encode()).digest(8 * n)
    return tuple((int.from_bytes(stream[i : i + 8], "little") >> 11) * 2.0**-53 for i in range(0, 8 * n, 8))


def view_times(view: View, start_s: float, stop_s: float) -> "np.ndarray":
    """Return the T moments of a clip in seconds, ascending, float64."""
    import numpy as np

    n_spans = len(view.offsets)
    return start_s + (np.arange(n_spans) + np.asarray(view.offsets)) * (stop_s - start_s) / n_spans


def crop_square(width: int, height: int, view: View) -> tuple[int, int, int]:
    """Return left, top and side, in whole pixels, of the view's crop of a picture.

    Raises MediaError if the view's box does not lie within the picture.
    """
    left, top, right, bottom = _fitting(view.box, width, height)
    side = max(1, round(view.scale * min(right - left, bottom - top)))
    x, y = view.center
    return left + round(x * (right - left - side)), top + round(y * (bottom - top - side)), side


def cut(picture: "np.ndarray", box: tuple[int, int, int, int] | None) -> "np.ndarray":
    """Return the part of a picture [H, W, ...] that lies in `box`; raises MediaError if it does not lie within it."""
    left, top, right, bottom = _fitting(box, picture.shape[1], picture.shape[0])
    return picture[top:bottom, left:right]


def _fitting(box: tuple[int, int, int, int] | None, width: int, height: int) -> tuple[int, int, int, int]:
    if box is not None and (box[2] > width or box[3] > height):
        raise MediaError(f"crop_box {box} does not fit into a picture of {width} x {height}. Correct crop_box.")
    return box or (0, 0, width, height)


def crop(picture: "np.ndarray", view: View, size: int) -> "np.ndarray":
    """Cut the view's crop out of a picture [H, W, C] and resize it to [size, size, C], not mirrored, same dtype.

    Shrinking averages areas (no aliasing), growing interpolates linearly.
    """
    import cv2

    cv2.setNumThreads(1)  # many readers run side by side, and OpenCV's threads do not survive a fork
    left, top, side = crop_square(picture.shape[1], picture.shape[0], view)
    cut = picture[top : top + side, left : left + side]
    return cv2.resize(cut, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
