"""Numbered frames: a video as encoded pictures with numbers and a rate, in a folder or a pack."""

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from .errors import MediaError, cause
from .media import EPSILON_S, MOST_PIXELS, Frame
from .places import is_local, names, read_bytes, storage_errors

if TYPE_CHECKING:
    import av

PICTURE = re.compile(r"(.*?)([0-9]+)\.(jpe?g|png|webp)", re.IGNORECASE)
# First bytes of a picture -> FFmpeg's name of its decoder.
DECODERS = {b"\xff\xd8": "mjpeg", b"\x89PNG": "png", b"RIFF": "webp"}


class Pictures(Protocol):
    """Encoded pictures by number."""

    path: Path

    @property
    def fps(self) -> float | None:
        """Frames a second, where the pictures themselves state it."""

    @property
    def numbers(self) -> np.ndarray:
        """All numbers that there are, int64, ascending."""

    def read(self, number: int) -> bytes:
        """Return one encoded picture."""

    def name(self, number: int) -> str:
        """Return what a message calls a picture, there or not."""

    def close(self) -> None:
        """Close what is open."""


class NumberedFrames:
    """A film of numbered frames, each shown for 1 / fps seconds: number 1 from 0 on, or number 0 where there is one.

    fps: frames a second; None if the pictures state it themselves.  A clip that needs a missing frame finds the film
    broken there, and names it.  Every method raises MediaError, with the path, when something cannot be read.
    """

    def __init__(self, pictures: Pictures, fps: float | None) -> None:
        self.path, self.broken = pictures.path, ""
        self._pictures, self._given = pictures, fps
        self._decoders: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pictures.close()

    @property
    def fps(self) -> float:
        """Frames a second."""
        found = self._given or self._pictures.fps
        if not found:
            raise MediaError(f"{self.path}: numbered frames have no times. Set video_fps (flow: flow_fps).")
        return found

    @property
    def frame_s(self) -> float:
        """Seconds that a frame lasts."""
        return 1 / self.fps

    @property
    def has_pictures(self) -> bool:
        """Say yes; raises MediaError if there is none: a folder of frames that is empty is at fault."""
        if not len(self._pictures.numbers):
            raise MediaError(f"{self.path}: holds no numbered pictures. Unpack them, or correct the clip table.")
        return True

    @property
    def duration_s(self) -> float:
        """Seconds from the clock's zero to the end of the last frame."""
        n_frames = int(self._pictures.numbers[-1]) - self._first + 1 if self.has_pictures else 0
        return n_frames / self.fps

    @property
    def stated_s(self) -> float:
        """The same: numbers are all that there is to believe."""
        return self.duration_s

    @property
    def _first(self) -> int:
        return min(1, int(self._pictures.numbers[0]))

    def worth_seeking(self, from_s: float, to_s: float) -> bool:
        """Say yes: every frame stands for itself."""
        return True

    def frames(self, from_s: float) -> Iterator[Frame]:
        """Yield frames up to the first gap, from the one before that on display at `from_s`; nothing is read yet.

        A film that has neither the frame on display nor the one before yields nothing.
        """
        numbers, fps, first = self._pictures.numbers, self.fps, self._first
        wanted = max(first, first + int((from_s + EPSILON_S) * fps))
        at = int(np.searchsorted(numbers, wanted - 1))
        due = wanted
        if at < len(numbers) and numbers[at] == wanted - 1:
            due = wanted - 1
        self.broken = ""
        while at < len(numbers) and numbers[at] < due:
            at += 1
        for number in numbers[at:].tolist():
            if number != due:
                break
            yield Frame((number - first) / fps, 1 / fps, partial(self._picture, number))
            due += 1
        self.broken = f"{self._pictures.name(due)} is missing"

    def _picture(self, number: int) -> "av.VideoFrame":
        name = f"{self.path}: {self._pictures.name(number)}"
        return decode_picture(self._pictures.read(number), name, self._decoders)


def decode_picture(data: bytes, name: str, decoders: dict[str, Any]) -> "av.VideoFrame":
    """Return an encoded JPEG, PNG or WebP as a frame; `decoders` keeps one decoder of a kind for the next picture.

    Raises MediaError, with the name, if the picture is damaged in any way.
    """
    import av

    kind = next((kind for magic, kind in DECODERS.items() if data.startswith(magic)), None)
    if kind is None:
        raise MediaError(f"{name} is no JPEG, PNG or WebP. Fetch it again.")
    # Packs of fixed width fill up with zeros; FFmpeg itself would paint what is missing grey.
    if kind == "mjpeg" and b"\xff\xd9" not in data.rstrip(b"\0")[-64:]:
        raise MediaError(f"{name} is cut short. Fetch it again.")
    if kind not in decoders:
        decoders[kind] = av.CodecContext.create(kind, "r")
        decoders[kind].thread_count = 1
        decoders[kind].options = {"err_detect": "explode", "max_pixels": str(MOST_PIXELS)}
    packet = av.Packet(data)
    packet.is_keyframe = True  # else FFmpeg takes a PNG for the difference to the one before
    try:
        frames = decoders[kind].decode(packet)
    except (av.error.FFmpegError, MemoryError) as error:
        del decoders[kind]
        raise MediaError(f"{name} is damaged: {cause(error)}. Fetch it again.") from None
    if len(frames) != 1 or frames[0].is_corrupt:
        del decoders[kind]
        raise MediaError(f"{name} is damaged: {len(frames)} pictures in it. Fetch it again.")
    return frames[0]


class FrameFolder:
    """Pictures as files whose names end in their numbers, such as frame_0000000001.jpg; other files are ignored."""

    fps = None

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def numbers(self) -> np.ndarray:
        """All numbers, ascending."""
        return self._listing()[0]

    def read(self, number: int) -> bytes:
        """Return one file's bytes."""
        try:
            return read_bytes(self.path / self.name(number))
        except storage_errors() as error:
            raise MediaError(f"{self.path / self.name(number)}: {cause(error)}. Fetch it again.") from None

    def name(self, number: int) -> str:
        """Return the name that the file of a number has, or would have."""
        _, names = self._listing()
        known = names.get(number)
        if known is None:
            like = PICTURE.fullmatch(next(iter(names.values()), "0001.jpg"))
            assert like is not None  # no other name is listed
            prefix, digits, kind = like.groups()
            return f"{prefix}{number:0{len(digits)}d}.{kind}"
        return known

    def close(self) -> None:
        """Nothing stays open."""

    def _listing(self) -> tuple[np.ndarray, dict[int, str]]:
        try:
            return _listed(self.path, self.path.stat().st_mtime_ns if is_local(self.path) else 0)
        except FileNotFoundError:
            raise MediaError(f"{self.path}: no such folder. Put it there, or correct the clip table.") from None
        except storage_errors() as error:
            raise MediaError(f"{self.path}: cannot be listed: {cause(error)}. Make the folder readable.") from None


# The clips of one video come one after another, and a folder of 100,000 frames takes a tenth of a second to list.
@lru_cache(maxsize=8)
def _listed(path: Path, _mtime: int) -> tuple[np.ndarray, dict[int, str]]:
    by_number: dict[int, str] = {}
    prefix = None
    for name in names(path):
        match = PICTURE.fullmatch(name)
        if match is None:
            continue
        number = int(match[2])
        if number in by_number or prefix not in (None, match[1]):
            other = by_number.get(number) or next(iter(by_number.values()))
            raise MediaError(f"{path}: holds both {other} and {name}, expected one row of numbered pictures.")
        by_number[number], prefix = name, match[1]
    return np.array(sorted(by_number), np.int64), by_number
