"""Small media files made on the spot, and the real ones where they are at hand."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

SIDE, BITS = 64, 8
TICK = Fraction(1, 60_000)


@pytest.fixture
def shared_data(shared: Path) -> Path:
    """Folder of the real clips; see `shared`."""
    return shared / "data"


def numbered_picture(number: int) -> np.ndarray:
    """Return a picture [64, 64, 3] that shows a number as eight black or white columns, lowest bit left."""
    columns = np.repeat([255 * (number >> bit & 1) for bit in range(BITS)], SIDE // BITS).astype(np.uint8)
    return np.broadcast_to(columns[None, :, None], (SIDE, SIDE, 3)).copy()


@pytest.fixture
def numbered() -> Callable[[int], np.ndarray]:
    """Return the function that draws a number."""
    return numbered_picture


def write_film(path: Path, pictures: list, times: list[float], sound: np.ndarray | None = None, **how) -> Path:
    """Write pictures [H, W, 3] at given times (H.264, two B-frames, a key frame every 12), and mono sound at 16 kHz.

    how: pix_fmt, color_range, display matrix and audio codec, where they matter.
    """
    options = {"bf": "2", "g": "12", "crf": "12", "b-adapt": "0", "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = how.get("pix_fmt", "yuv420p")
        stream.codec_context.time_base = stream.time_base = TICK
        if "color_range" in how:
            stream.codec_context.color_range = how["color_range"]
        if "matrix" in how:
            stream.set_display_matrix(how["matrix"])
        track = None
        if sound is not None:
            track = container.add_stream(how.get("codec", "aac"), rate=16_000, layout="mono")
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=stream.pix_fmt, dst_color_range=how.get("color_range")
            )
            frame.pts, frame.time_base = round(time / TICK), TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None:
            frame = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, 0
            container.mux(track.encode(frame))
            container.mux(track.encode())
    return path


@pytest.fixture
def film(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes `name` showing the numbers 0, 1, 2, ... at `times`, or any `pictures`."""

    def write(name: str, times: list[float], pictures: list[np.ndarray] | None = None, **how) -> Path:
        shown = pictures or [numbered_picture(number) for number in range(len(times))]
        return write_film(tmp_path / name, shown, times, **how)

    return write


@pytest.fixture
def number_in() -> Callable[[np.ndarray], int]:
    """Return a function that reads the number off a picture [64, 64, 3], whatever the blur."""

    def read(picture: np.ndarray) -> int:
        width = SIDE // BITS
        middles = picture[SIDE // 2, width // 2 :: width].mean(axis=-1)
        return sum(1 << bit for bit, value in enumerate(middles) if value > 127)

    return read


@pytest.fixture
def wav(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes samples [n] or [channels, n] in -1..1 as 16-bit WAV."""

    def write(name: str, samples: np.ndarray, rate: int = 16_000) -> Path:
        import wave

        channels = np.atleast_2d(samples)
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setnchannels(len(channels))
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(np.rint(channels.T * 32767).astype("<i2").tobytes())
        return tmp_path / name

    return write
