"""What a student is given of a clip, as pictures for people: frames, flow in colours, spectrograms and boxes.

All pictures are made from the very arrays that go into the model, and show nothing that is not in them.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import matplotlib
import numpy as np
from matplotlib.colors import hsv_to_rgb

from ..data.audio import mel_edges, segment_hops
from ..data.config import DataConfig
from ..data.detections import HAND
from ..data.released import ZERO
from ..data.thumbnails import png

FAST_PERCENT = 99
LEAST_LEVELS = 8.0  # of 127: a clip without motion is not to look as if its noise were one
WHEEL_SIDE = 65
SPAN = 6.0  # of log10 power: 60 dB
TICKS_HZ = (100, 250, 500, 1000, 2000, 4000, 8000, 16000)
NEAREST_TICKS = 0.07  # of the height
STEPS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
MOST_TICKS = 5


def address(picture: np.ndarray) -> str:
    """Return a picture, uint8 [H, W, 3] or [H, W], as a data address that holds every pixel of it."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def frames(video: np.ndarray) -> list[np.ndarray]:
    """Return frames, uint8 [T, 3, H, W], as pictures [H, W, 3]."""
    return [np.ascontiguousarray(frame.transpose(1, 2, 0)) for frame in video]


def fast(flow: np.ndarray) -> float:
    """Return the speed, in levels, from which flow, uint8 [T, 3, H, W], is shown in full colour.

    Not the largest of all: one wild pixel would leave everything else pale.
    """
    return max(float(np.percentile(np.hypot(*_motion(flow)), FAST_PERCENT)), LEAST_LEVELS)


def flow_colours(flow: np.ndarray, full: float) -> np.ndarray:
    """Return flow, uint8 [T, 3, H, W], in colours, uint8 [T, H, W, 3].

    The hue says where to (right is red, up is green), the strength of the colour how fast: white is no motion, full
    colour `full` levels or more.
    """
    right, down = _motion(flow)
    hue = np.arctan2(-down, right) / (2 * np.pi) % 1.0
    strength = np.minimum(np.hypot(right, down) / full, 1.0)
    return np.rint(255 * hsv_to_rgb(np.stack([hue, strength, np.ones_like(hue)], axis=-1))).astype(np.uint8)


def _motion(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return levels of motion to the right and down, float32 [T, H, W]."""
    motion = flow[:, :2].astype(np.float32) - ZERO
    return motion[:, 0], motion[:, 1]


def flow_wheel() -> np.ndarray:
    """Return the key to `flow_colours`, uint8 [S, S, 3]: the colour of a motion from the middle to where it stands."""
    far = WHEEL_SIDE // 2
    down, right = np.mgrid[-far : far + 1, -far : far + 1]
    levels = np.rint(ZERO + 127 * np.stack([right, down]) / far).astype(np.uint8)  # [2, S, S]
    return flow_colours(levels[None], 127.0)[0]


@dataclass(frozen=True)
class Heard:
    """A stretch of sound without a gap: its picture, uint8 [mels, steps, 3], low tones at the bottom."""

    picture: np.ndarray
    start_s: float
    stop_s: float

    def ticks(self, step_s: float | None) -> list[tuple[str, float]]:
        """Return the multiples of a step as names, and where they stand: 0 at the left, 1 at the right.

        Without a step, the middle alone.
        """
        if step_s is None:
            return [(f"{(self.start_s + self.stop_s) / 2:.2f} s", 0.5)]
        decimals = 0 if step_s >= 1 else 1 if step_s >= 0.1 else 2
        times = [n * step_s for n in range(ceil(self.start_s / step_s), floor(self.stop_s / step_s) + 1)]
        return [(f"{time:.{decimals}f} s", (time - self.start_s) / (self.stop_s - self.start_s)) for time in times]


def loudness(segments: np.ndarray) -> tuple[float, float]:
    """Return the log10 powers that are drawn darkest and brightest: at most `SPAN` apart, or silence hides the rest."""
    high = float(segments.max())
    return max(float(segments.min()), high - SPAN), high


def sound(segments: np.ndarray, times: np.ndarray, data: DataConfig) -> list[Heard]:
    """Return log-mel segments, float32 [T, mels, steps], as stretches: what of them overlaps is shown once.

    times: [T], the moments around which they lie, in seconds.
    """
    low, high = loudness(segments)
    hops, first = np.unique(segment_hops(times, data), return_index=True)
    columns = segments.transpose(0, 2, 1).reshape(-1, segments.shape[1])[first]  # [n, mels]
    shares = np.clip((columns.T[::-1] - low) / max(high - low, 1e-6), 0, 1)  # [mels, n]
    colours = matplotlib.colormaps["magma"](shares, bytes=True)[..., :3]
    cuts, hop_s = np.flatnonzero(np.diff(hops) > 1) + 1, data.audio_hop / data.audio_rate
    return [
        Heard(np.ascontiguousarray(picture), (own[0] - 0.5) * hop_s, (own[-1] + 0.5) * hop_s)
        for own, picture in zip(np.split(hops, cuts), np.split(colours, cuts, axis=1), strict=True)
    ]


def step_s(stretches: Sequence[Heard]) -> float | None:
    """Return the seconds from tick to tick under a stretch, so that there are few; None for several of them."""
    if len(stretches) > 1:
        return None
    lasts = stretches[0].stop_s - stretches[0].start_s
    return next((step for step in STEPS_S if lasts / step <= MOST_TICKS), STEPS_S[-1])


def tones(data: DataConfig) -> list[tuple[str, float]]:
    """Return the ticks of a spectrogram: a name in Hz, and how high it stands, 0 at the bottom, 1 at the top."""
    peaks = mel_edges(data.audio_rate, data.audio_mels)[1:-1]
    bins = (np.interp(TICKS_HZ, peaks, np.arange(len(peaks)), left=-1, right=-1) + 0.5) / len(peaks)
    out: list[tuple[str, float]] = []
    for hz, share in zip(TICKS_HZ, bins.tolist(), strict=True):
        if share > (out[-1][1] + NEAREST_TICKS if out else 0):
            out.append((f"{hz // 1000} kHz" if hz >= 1000 else f"{hz} Hz", share))
    return out


@dataclass(frozen=True)
class Box:
    """A box in 0..1 of the picture, and what it is a box of."""

    x: float
    y: float
    width: float
    height: float
    score: float
    kind: str


def boxes(detections: np.ndarray) -> list[Sequence[Box]]:
    """Return the boxes of each moment; detections: float32 [T, n, 6], rows of category 0 holding none."""
    out: list[Sequence[Box]] = []
    for rows in detections.tolist():
        kinds = ("hand" if row[5] == HAND else "object" for row in rows if row[5])
        sides = ((x, y, right - x, bottom - y, score) for x, y, right, bottom, score, category in rows if category)
        out.append([Box(*own, kind) for own, kind in zip(sides, kinds, strict=True)])
    return out
