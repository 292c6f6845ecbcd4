"""Released flow: u and v as numbered grey pictures, in a folder or a pack with the members `u` and `v`.

Values stay as they were released: 8 bits, 128 = no motion, u above it to the right, v downwards, at the release's own
scale (EPIC-KITCHENS: about 16 grey levels for a pixel of one flow step, so -8 to 8 pixels).  Computed flow has another
scale and must not be mixed with it: the method is part of a cache's identity.  The three channels are those of computed
flow: u, v and magnitude.

Flow frame n, counted from 1, belongs to the time from (n - 1) / fps to n / fps.  EPIC-KITCHENS released the videos of
2018 at 60 frames a second and their flow at 30: RGB frame n goes with flow frame (n - 1) // 2 + 1.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from .config import DataConfig
from .errors import MediaError
from .packs import open_frames
from .video import Converter, frames_at
from .views import View, crop, cut

ZERO = 128
LARGEST_MAGNITUDE = 180  # 127 * sqrt(2), as of computed flow


def read_released(source: Path, fps: float | None, times: np.ndarray, view: View, data: DataConfig) -> np.ndarray:
    """Return the flow on display at times [T] as pictures, uint8 [T, 3, S, S]: u, v, magnitude.

    Raises MediaError if a picture is missing or damaged, or if u and v do not match.
    """
    out = np.empty((len(times), 3, data.size, data.size), np.uint8)
    parts = [_shown(source / name, fps, times) for name in ("u", "v")]
    for (u_places, u), (v_places, v) in zip(*parts, strict=True):
        if u_places != v_places or u.shape != v.shape:
            raise MediaError(f"{source}: u and v differ in number or size ({u.shape}, {v.shape}). Fetch both again.")
        out[u_places] = released_picture(np.dstack([u, v]), view, data.size)
    return out


def _shown(path: Path, fps: float | None, times: np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield (places, grey picture [H, W]) for the frames on display at the times."""
    converter = Converter()
    with open_frames(path, fps) as film:
        for shown in frames_at(film, times) if film.has_pictures else ():
            yield shown.places, converter.grey(shown.frame)


def released_picture(levels: np.ndarray, view: View, size: int) -> np.ndarray:
    """Return the view of one released field, uint8 [H, W, 2] to uint8 [3, size, size]."""
    motion = cut(levels, view.box).astype(np.float32) - ZERO
    magnitude = np.minimum(np.hypot(motion[..., 0], motion[..., 1]), LARGEST_MAGNITUDE)
    values = crop(np.dstack([motion, magnitude]), replace(view, box=None), size)  # [S, S, 3]
    if view.flip:
        values = values[:, ::-1] * np.array([-1, 1, 1], np.float32)
    levels = np.rint(values) + np.array([ZERO, ZERO, 0], np.float32)
    return np.clip(levels, 0, 255).astype(np.uint8).transpose(2, 0, 1)  # [3, S, S]
