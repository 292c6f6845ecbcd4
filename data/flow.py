"""Optical flow computed from the video, encoded as the three channels that backbones expect.

The choices, all part of what a token store rests on:

- A pair starts at the frame on display at t and ends at the one on display `flow_step_s` later; near the end of the
  clip it ends at t and starts that much earlier.  Where both are the same frame (12 frames a second, say), the
  neighbour takes the place of one: a still that the frame rate makes is not a motion of zero.
- Values are pixels per `flow_step_s`: the displacement over the time that really lies between the two frames, so that
  25 frames a second (pairs 40 or 80 ms apart) do not make the speed flicker.
- Pixels are those of the resolution at which flow is computed, and stay so when the crop is resized: EPIC-KITCHENS'
  and Kinetics' flow images are cropped and resized as images, and backbones were trained on that.
- 8 bits, 128 = no motion: u = 128 + 127 u / clamp (above 128: to the right), v likewise (above 128: down), rounded,
  1..255.  So mirroring a view turns u into 256 - u exactly.
- Three channels, since backbones pretrained on video have three: u, v and their magnitude, which survives the averaging
  of motions that cancel.  The third is 127 |(u, v)| / clamp, 0 = no motion, at most 180, in the same levels per pixel,
  taken before resizing.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .config import DataConfig
from .errors import MediaError
from .flow_methods import flow_method
from .media import Frame
from .video import Converter, Film, Shown
from .views import View, crop

# DIS matches patches of 8 pixels at half the resolution; OpenCV refuses pictures below this.
SMALLEST_PX = 12


def pair_ends(times: np.ndarray, stop_s: float, step_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the other end of the pair that each time belongs to, and whether it is the later one (bool)."""
    forward = times + step_s < stop_s
    return np.where(forward, times + step_s, times - step_s), forward


class FlowPairs:
    """Collects the frames of n pairs while the video is decoded, each converted once and cut to the crop box."""

    def __init__(self, film: Film, n_pairs: int, data: DataConfig) -> None:
        self.film, self.data, self.method = film, data, flow_method(data)
        self.ends = np.full((n_pairs, 2), np.nan)  # times of the frames, not the times asked for
        self._pictures: dict[float, np.ndarray] = {}
        self._converter = Converter()

    def take(self, shown: Shown, firsts: list[int], seconds: list[int]) -> None:
        """Note that a frame is the first of the pairs `firsts` and the second of the pairs `seconds`."""
        if firsts or seconds:
            self._keep(shown.frame)
        self.ends[firsts, 0] = shown.time
        self.ends[seconds, 1] = shown.time
        still = sorted({*firsts} & {*seconds})
        if still and shown.after is not None:
            self.ends[still, 1] = shown.after.time
            self._keep(shown.after)
        elif still and shown.before is not None:
            self.ends[still, 0] = shown.before.time
            self._keep(shown.before)

    def _keep(self, frame: Frame) -> None:
        if frame.time not in self._pictures:
            convert = getattr(self._converter, self.method.form)
            self._pictures[frame.time] = convert(frame, self.data.flow_size, self.data.crop_box)

    def fields(self) -> Iterator[np.ndarray]:
        """Yield the flow of each pair, float32 [H, W, 2], in pixels to the right and down per `flow_step_s`.

        Raises MediaError if the video has a single frame, or if its picture is tiny or changes size.
        """
        path, known = self.film.path, {}
        for first, second in self.ends.tolist():
            if first >= second:
                raise MediaError(f"{path}: one frame only, at {first:.3f} s: there is no flow. Leave flow out.")
            if (first, second) not in known:
                one, two = self._pictures[first], self._pictures[second]
                if min(one.shape[:2]) < SMALLEST_PX:
                    raise MediaError(f"{path}: flow needs {SMALLEST_PX} pixels a side, found {one.shape[:2]}.")
                if one.shape != two.shape:
                    raise MediaError(f"{path}: the picture changes size before {second:.3f} s. Convert the file.")
                scale = np.float32(self.data.flow_step_s / (second - first))
                known[first, second] = self.method.compute(one, two) * scale
            yield known[first, second]


def flow_picture(field: np.ndarray, view: View, size: int, clamp_px: float) -> np.ndarray:
    """Return the view of one field [H, W, 2], uint8 [3, size, size]: u, v, magnitude (encoding: see above).

    The field covers the view's box already.
    """
    clamped = np.clip(field, -clamp_px, clamp_px)
    magnitude = np.hypot(clamped[..., 0], clamped[..., 1])
    values = crop(np.dstack([clamped, magnitude]), replace(view, box=None), size)  # [S, S, 3]
    if view.flip:
        values = values[:, ::-1] * np.array([-1, 1, 1], np.float32)
    return np.rint(values * (127 / clamp_px) + (128, 128, 0)).astype(np.uint8).transpose(2, 0, 1)  # [3, S, S]
