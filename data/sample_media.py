"""Pictures, sound, boxes and files of the embedded sample data set."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from .sample import DURATION_S, FPS, NOUNS, ClipPlan, generator

Floats = NDArray[np.floating]

SIZE = 96
FRAMES = int(FPS * DURATION_S)
RATE = 16000

DIRECTIONS = {"push": (1, 0), "pull": (-1, 0), "lift": (0, -1), "lower": (0, 1)}  # x to the right, y down
SKIN = np.array((245, 200, 165), np.float32)
HAND_STRAY = 0.5  # radians
PAN_PX = 24.0
HIDDEN_BLUR_PX = 3.5
NOISE_LEVELS = 4.0  # of 255
BOX_JITTER_PX = 1.5
P_BOX_DROPPED = 0.1

Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


@dataclass(frozen=True)
class Look:
    """An object's colour (RGB), the waves of its pattern per half size along x and y, and its sound."""

    colour: tuple[float, float, float]
    waves: tuple[float, float]
    pitch_hz: float
    harmonics: tuple[float, ...]
    beats_hz: float


LOOKS = {
    "ball": Look((225, 45, 40), (0, 0), 300, (1.0, 0.6), 2),
    "box": Look((235, 205, 45), (0, 7), 475, (1.0, 0.0, 0.5), 7),
    "tent": Look((50, 170, 60), (7, 0), 755, (1.0,), 3),
    "kite": Look((60, 205, 215), (6, 6), 1190, (1.0, 0.5, 0.3), 5),
    "cross": Look((50, 75, 215), (0, 0), 1890, (1.0, 0.4), 9),
    "ring": Look((205, 60, 200), (9, 0), 3000, (1.0,), 4),
}


@dataclass(frozen=True)
class Track:
    """Where things are, in pixels of the picture: centre and pan [frames, 2] as x, y; hand relative to the centre."""

    centre: Floats
    pan: Floats
    half: float
    hand: Floats


def draw_track(plan: ClipPlan) -> Track:
    """Draw the object's way through the picture: long, steady, with a random start, pace and size."""
    draw = generator(plan.seed, plan.index, 1)
    time = np.linspace(0, 1, FRAMES)
    start, stop = draw.uniform(0, 0.2), draw.uniform(0.75, 1)
    even = np.clip((time - start) / (stop - start), 0, 1)
    ease = draw.uniform(0, 1)
    done = (1 - ease) * even + ease * even**2 * (3 - 2 * even) - 0.5
    length, middle, side = draw.uniform(0.55, 0.7), 0.5 + draw.uniform(-0.05, 0.05), draw.uniform(0.3, 0.7)
    sway = draw.uniform(0, 0.03) * np.sin(2 * np.pi * (draw.uniform(0.5, 1.5) * time + draw.random()))
    along = np.array(DIRECTIONS[plan.verb], dtype=float)
    across = np.abs(along[::-1])
    centre = np.abs(along) * middle + length * done[:, None] * along + (side + sway)[:, None] * across  # [frames, 2]
    half = draw.uniform(15, 20)
    # The hand drives the object from behind; where the motion is not to be seen, it must not tell of it either.
    behind = np.arctan2(-along[1], -along[0]) + draw.uniform(-HAND_STRAY, HAND_STRAY)
    angle = draw.uniform(0, 2 * np.pi) if plan.frozen else behind
    hand = half * np.array([np.cos(angle), np.sin(angle)])
    angle = draw.uniform(0, 2 * np.pi)
    pan = plan.panned * PAN_PX * (time - 0.5)[:, None] * np.array([np.cos(angle), np.sin(angle)])
    return Track((SIZE * centre + pan).astype(np.float32), pan.astype(np.float32), half, hand.astype(np.float32))


def _length(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y)


def _distance(noun: str, x: Floats, y: Floats) -> Floats:
    """Return how far each point lies outside the object's outline (below 0: inside), in half sizes."""
    ax, ay, radius = np.abs(x), np.abs(y), _length(x, y)
    outlines: dict[str, Callable[[], Floats]] = {
        "ball": lambda: radius - 0.95,
        "box": lambda: np.maximum(ax, ay) - 0.85,
        "tent": lambda: np.maximum(0.89 * ax - 0.45 * y - 0.45, y - 0.85),
        "kite": lambda: (ax + ay - 1.1) / 2**0.5,
        "cross": lambda: np.minimum(np.maximum(ax - 1, ay - 0.35), np.maximum(ax - 0.35, ay - 1)),
        "ring": lambda: np.abs(radius - 0.68) - 0.28,
    }
    return outlines[noun]()


def _laid(picture: Floats, cover: Floats, colour: Floats) -> Floats:
    """Lay a colour on the picture [S, S, 3] where `cover` [S, S] is 1."""
    return picture + np.clip(cover, 0, 1)[..., None] * (colour - picture)


def _background(draw: np.random.Generator) -> Floats:
    """Draw a muted texture [2 S, 2 S, 3] of coarse and fine patches, wider than the picture so that it can pan."""
    cast = draw.uniform(60, 115) + draw.uniform(-14, 14, 3)
    picture = np.zeros((2 * SIZE, 2 * SIZE, 1), np.float32) + cast.astype(np.float32)
    for patches, levels in ((5, 12), (40, 9)):
        coarse = draw.uniform(-levels, levels, (patches, patches)).astype(np.float32)
        picture += cv2.resize(coarse, picture.shape[1::-1], interpolation=cv2.INTER_CUBIC)[..., None]
    return picture


def _seen(background: Floats, pan: Floats) -> Floats:
    """Return the middle [S, S, 3] of the background, moved by `pan` pixels."""
    return np.asarray(cv2.getRectSubPix(background, (SIZE, SIZE), [SIZE - float(shift) for shift in pan]), np.float32)


def _blurred(picture: Floats, radius: float) -> Floats:
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), radius), np.float32)


def _with_hand(picture: Floats, centre: Floats, hand: Floats, half: float) -> Floats:
    """Lay a forearm that comes from beyond the picture's edge, and a round hand, on the picture."""
    x, y = X - centre[0] - hand[0], Y - centre[1] - hand[1]
    along = (x * hand[0] + y * hand[1]) / half
    arm = np.maximum(np.abs(x * hand[1] - y * hand[0]) / half - 0.45 * half, -along)
    return _laid(picture, 0.5 - np.minimum(arm, _length(x, y) - 0.55 * half), SKIN)


def _with_object(picture: Floats, noun: str, colour: Floats, centre: Floats, half: float) -> Floats:
    x, y = (X - centre[0]) / half, (Y - centre[1]) / half
    waves = LOOKS[noun].waves
    shade = np.where(np.sin(waves[0] * x + waves[1] * y) < 0, np.float32(0.55), np.float32(1))[..., None]
    return _laid(picture, 0.5 - half * _distance(noun, x, y), shade * colour)


def draw_frames(plan: ClipPlan) -> NDArray[np.uint8]:
    """Draw the clip's pictures, uint8 [frames, S, S, 3], RGB."""
    draw = generator(plan.seed, plan.index, 2)
    track, background = draw_track(plan), _background(draw)
    gain, board = draw.uniform(0.8, 1.1), (draw.uniform(90, 160) + draw.uniform(-14, 14, 3)).astype(np.float32)
    grey = np.full(3, background.mean() + (80 if background.mean() < 125 else -80), np.float32)
    colour = grey if plan.hidden else np.array(LOOKS[plan.noun].colour, np.float32)
    speed, place = draw.uniform(-40, 40, 2), draw.uniform(0.25, 0.75, 2) * SIZE
    frozen_at, frames = int(draw.integers(FRAMES)), []
    for frame in range(FRAMES):
        at = frozen_at if plan.frozen else frame
        picture = _seen(background, track.pan[at])
        if plan.distracted:
            x, y = (place + speed * (at / FRAMES - 0.5)).tolist()
            picture = _laid(picture, 10 - _length(X - x, Y - y), grey)
        if plan.hand:
            picture = _with_hand(picture, track.centre[at], track.hand, track.half)
        picture = _with_object(picture, plan.noun, colour, track.centre[at], track.half)
        if plan.hidden:
            picture = _blurred(picture, HIDDEN_BLUR_PX)
        if plan.covered:
            picture = _laid(picture, 45.5 - np.maximum(np.abs(X - 47.5), np.abs(Y - 47.5)), board)
        noise = 0 if plan.frozen else NOISE_LEVELS * draw.standard_normal((SIZE, SIZE, 1), np.float32)
        frames.append(np.clip(gain * picture + noise, 0, 255).astype(np.uint8))
    return np.stack(frames)


def _tone(noun: str, draw: np.random.Generator) -> Floats:
    """Draw an object's beating sound, heard from start to end, of about unit power."""
    look = LOOKS[noun]
    time = np.arange(int(RATE * DURATION_S)) / RATE
    pitch = look.pitch_hz * draw.uniform(0.97, 1.03)
    waves = [
        power * np.sin(2 * np.pi * (pitch * order * time + draw.random()))
        for order, power in enumerate(look.harmonics, start=1)
    ]
    beat = 0.65 + 0.35 * np.sin(2 * np.pi * (look.beats_hz * time + draw.random()))
    sound = beat * np.sum(waves, axis=0)
    return np.asarray(sound / sound.std())


def _noise(draw: np.random.Generator) -> Floats:
    """Draw noise of unit power, anywhere between white and pink."""
    spectrum = np.fft.rfft(draw.normal(size=int(RATE * DURATION_S)))
    spectrum /= np.maximum(np.arange(spectrum.size), 50) ** draw.uniform(0, 0.5)
    noise = np.fft.irfft(spectrum)
    return np.asarray(noise / noise.std())


def draw_sound(plan: ClipPlan) -> NDArray[np.float32] | None:
    """Draw the clip's sound, float32 [samples] in -1..1 at 16 kHz; None for a clip without a sound track."""
    if plan.sound == "absent":
        return None
    draw = generator(plan.seed, plan.index, 3)
    others = draw.choice([noun for noun in NOUNS if noun != plan.noun], 2, replace=False)
    heard = {"clear": [plan.noun], "others": list(others), "drowned": []}[plan.sound]
    sound = sum((_tone(noun, draw) for noun in heard), draw.uniform(0.1, 0.3) * _noise(draw))
    return (draw.uniform(0.05, 0.15) * sound / np.std(sound)).clip(-1, 1).astype(np.float32)


def _box_track(plan: ClipPlan, draw: np.random.Generator) -> Floats:
    """Return the centre [frames, 2] that the boxes follow: the object's, or that of something else."""
    if plan.boxes == "clear":
        return draw_track(plan).centre
    steps = draw.normal(0, 3.0 if plan.boxes == "astray" else 0.0, (FRAMES, 2))
    return np.clip(draw.uniform(0.25, 0.75, 2) * SIZE + np.cumsum(steps, axis=0), 0, SIZE)


def draw_boxes(plan: ClipPlan) -> dict[str, object]:
    """Draw the clip's boxes, in pixels, within the picture: {"fps", "width", "height", "frames": [...]}.

    Each frame is labelled as in Something-Else, without boxes that missed it or lie outside the picture.
    """
    draw = generator(plan.seed, plan.index, 4)
    track, centres = draw_track(plan), _box_track(plan, draw)
    things = [("object", "0000", np.zeros(2), 1.0)] + [("hand", "hand", track.hand, 0.55)] * plan.hand
    frames = []
    for frame, centre in enumerate(centres):
        labels = []
        for category, standard, offset, scale in things:
            reach = scale * track.half * np.array([-1, -1, 1, 1])
            corners = np.tile(centre + offset, 2) + reach + draw.normal(0, BOX_JITTER_PX, 4)
            x1, y1, x2, y2 = (round(float(corner), 2) for corner in np.clip(corners, 0, SIZE))
            if draw.random() >= P_BOX_DROPPED and x2 - x1 >= 1 and y2 - y1 >= 1:
                box = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
                labels.append({"box2d": box, "category": category, "standard_category": standard})
        frames.append({"name": f"{plan.clip_id}/{frame + 1:04d}.jpg", "labels": labels})
    return {"fps": FPS, "width": SIZE, "height": SIZE, "frames": frames}


def encode(frames: NDArray[np.uint8], sound: NDArray[np.float32] | None) -> bytes:
    """Encode pictures [frames, S, S, 3] and sound [samples] as an MP4 file; the same input gives the same bytes."""
    # One thread, and no macroblock tree: with it, x264's bytes at this size depended on what memory had held before.
    buffer, fast = io.BytesIO(), {"aac_coder": "fast"}
    exact = {"preset": "veryfast", "crf": "23", "threads": "1", "x264-params": "mbtree=0"}
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as file:
        video = file.add_stream("libx264", rate=FPS, options=exact)
        video.width, video.height, video.pix_fmt = SIZE, SIZE, "yuv420p"
        audio = None if sound is None else file.add_stream("aac", rate=RATE, layout="mono", options=fast)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            file.mux(video.encode(frame))
        file.mux(video.encode())
        if audio is not None and sound is not None:
            block = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = RATE, 0, Fraction(1, RATE)
            file.mux(audio.encode(block))
            file.mux(audio.encode())
    return buffer.getvalue()
