"""Optical flow computed from the video with OpenCV's DIS, encoded as the three channels that backbones expect.

The choices, all part of what a token store rests on:

- Preset MEDIUM.  FAST, five times faster, understates small motions: of a square moving 1, 2, 4 pixels it sees 0.6,
  1.4 and 3.7 (MEDIUM 0.9, 2.0, 4.0).
- A pair starts at the frame on display at t and ends at the one on display `flow_step_s` later; near the end of the
  clip it ends at t and starts that much earlier.  Where both are the same frame (12 frames a second, say), the
  neighbour takes the place of one: a still that the frame rate makes is not a motion of zero.
- Values are pixels per `flow_step_s`: the displacement over the time that really lies between the two frames, so that
  25 frames a second (pairs 40 or 80 ms apart) do not make the speed flicker.
- Pixels are those of the resolution at which flow is computed, and stay so when the crop is resized: EPIC-KITCHENS'
  and Kinetics' flow images are cropped and resized as images, and backbones were trained on that.
- 8 bits, 128 = no motion: u = 128 + 127 u / clamp (above 128: to the right), v likewise (above 128: down), rounded,
  1..255.  So mirroring a view turns u into 256 - u exactly.
- Third channel: magnitude, 127 |(u, v)| / clamp, 0 = no motion, at most 180, in the same levels per pixel.  It is
  taken before resizing, so it still tells of motions that cancel when averaged.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .errors import MediaError
from .media import Media
from .video import Shown, to_grey
from .views import View, crop

if TYPE_CHECKING:
    import av

# DIS matches patches of 8 pixels at half the resolution; OpenCV refuses pictures below this.
SMALLEST_PX = 12


def pair_ends(times: np.ndarray, stop_s: float, step_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the other end of the pair that each time belongs to, and whether it is the later one (bool)."""
    forward = times + step_s < stop_s
    return np.where(forward, times + step_s, times - step_s), forward


class FlowPairs:
    """Collects the grey frames of n pairs while the video is decoded, each converted once."""

    def __init__(self, media: Media, n_pairs: int, short_side: int) -> None:
        self.media, self.short_side = media, short_side
        self.ends = np.full((n_pairs, 2), np.nan)  # times of the frames, not the times asked for
        self._grey: dict[float, np.ndarray] = {}

    def take(self, shown: Shown, firsts: list[int], seconds: list[int]) -> None:
        """Note that a frame is the first of the pairs `firsts` and the second of the pairs `seconds`."""
        if firsts or seconds:
            self._keep(shown.time, shown.frame)
        self.ends[firsts, 0] = shown.time
        self.ends[seconds, 1] = shown.time
        still = sorted({*firsts} & {*seconds})
        if still and shown.after is not None:
            self.ends[still, 1] = shown.after[0]
            self._keep(*shown.after)
        elif still and shown.before is not None:
            self.ends[still, 0] = shown.before[0]
            self._keep(*shown.before)

    def _keep(self, time: float, frame: "av.VideoFrame") -> None:
        if time not in self._grey:
            self._grey[time] = to_grey(self.media, frame, self.short_side)

    def fields(self, step_s: float) -> Iterator[np.ndarray]:
        """Yield the flow of each pair, float32 [H, W, 2], in pixels to the right and down per `step_s`.

        Raises MediaError if the video has a single frame, or if its picture is tiny or changes size.
        """
        import cv2

        cv2.setNumThreads(1)  # the field must not depend on the number of threads
        dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        path, known = self.media.path, {}
        for first, second in self.ends.tolist():
            if first >= second:
                raise MediaError(f"{path}: one frame only, at {first:.3f} s: there is no flow. Leave flow out.")
            if (first, second) not in known:
                one, two = self._grey[first], self._grey[second]
                if min(one.shape) < SMALLEST_PX:
                    raise MediaError(f"{path}: flow needs {SMALLEST_PX} pixels a side, found {one.shape}.")
                if one.shape != two.shape:
                    raise MediaError(f"{path}: the picture changes size before {second:.3f} s. Convert the file.")
                known[first, second] = dis.calc(one, two, None) * np.float32(step_s / (second - first))
            yield known[first, second]


def flow_picture(field: np.ndarray, view: View, size: int, clamp_px: float) -> np.ndarray:
    """Return the view of one field [H, W, 2], uint8 [3, size, size]: u, v, magnitude (encoding: see above)."""
    clamped = np.clip(field, -clamp_px, clamp_px)
    magnitude = np.hypot(clamped[..., 0], clamped[..., 1])
    values = crop(np.dstack([clamped, magnitude]), view, size)  # [S, S, 3]
    if view.flip:
        values = values[:, ::-1] * np.float32([-1, 1, 1])
    return np.rint(values * (127 / clamp_px) + (128, 128, 0)).astype(np.uint8).transpose(2, 0, 1)  # [3, S, S]
