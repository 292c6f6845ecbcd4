"""Media files of any container that PyAV reads: opening, the clock, and decoding forward from a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .errors import MediaError

if TYPE_CHECKING:
    import av
    import numpy as np

# Clip tables and WebM round times to milliseconds: a time this little before a frame means that frame.
EPSILON_S = 6e-4
# How far before the wanted time a seek may have to go: some indexes know decoding times only, some are coarse.
SEEK_BACK_S = (0.0, 2.0, 10.0)
# A file may state a duration this much longer than what it holds (rounding, delays) before it counts as cut short.
STATED_SLACK_S = 0.5


@dataclass(frozen=True)
class Reading:
    """What one modality of one clip gave: its array if `state` is PRESENT, else None and the reason."""

    state: int
    array: "np.ndarray | None"
    reason: str = ""


class Media:
    """One file, opened when first needed and at most once at a time; used in a `with` block.

    Its clock starts with its first picture, or with its first sound where it has no pictures; all times are seconds
    on that clock.  Every method raises MediaError, with the file and the cause, when the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = ""
        self._container: av.container.InputContainer | None = None
        self._used = False
        self._converters: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._container is not None:
            self._container.close()

    @property
    def container(self) -> "av.container.InputContainer":
        """The open file."""
        if self._container is None:
            self._container = self._open()
        return self._container

    def _open(self) -> "av.container.InputContainer":
        import av

        if not self.path.exists():
            raise MediaError(f"{self.path}: no such file. Put it there, or correct the clip table.")
        try:
            container = av.open(str(self.path), metadata_errors="replace")
        except av.error.FFmpegError as error:
            raise MediaError(f"{self.path}: not a media file: {_cause(error)}. Fetch it again.") from None
        for stream in (*container.streams.video, *container.streams.audio):
            if stream.codec_context is not None:
                # One thread: where a damaged file breaks off must not depend on the machine.
                stream.codec_context.thread_count = 1
        return container

    @property
    def pictures(self) -> "av.VideoStream | None":
        """The first video stream that is not a cover picture; None if there is none."""
        import av

        cover = av.stream.Disposition.attached_pic
        return next((stream for stream in self.container.streams.video if not stream.disposition & cover), None)

    @property
    def sound(self) -> "av.AudioStream | None":
        """The first audio stream; None if there is none."""
        return next(iter(self.container.streams.audio), None)

    @cached_property
    def start_s(self) -> float:
        """Time of the clock's zero in the file's own time stamps."""
        stream = self.pictures or self.sound
        if stream is None:
            return 0.0
        # AVI has no times of display: its start is where decoding starts, some frames before the first is shown.
        if stream.start_time is not None and self.container.format.name != "avi":
            return float(stream.start_time * stream.time_base)
        return next((time for time, _ in self._decode_forward(stream.index, None, 0.0)), 0.0)

    @cached_property
    def duration_s(self) -> float:
        """Seconds of picture (of sound, where there is no picture), counted over the packets: headers may be wrong.

        Raises MediaError if the file's header promises much more than the file holds: it has been cut short.
        """
        if self.pictures is None and self.sound is None:
            raise MediaError(f"{self.path}: holds neither picture nor sound. Correct the clip table.")
        held = self._held_end_s() - self.start_s
        stream = self.pictures or self.sound  # only now: both may have opened the file anew
        stated = float((stream.duration or 0) * stream.time_base)
        if held <= 0:  # a single packet that does not say how long it lasts
            return stated
        if stated > held + STATED_SLACK_S:
            raise MediaError(f"{self.path}: says {stated:.2f} s, holds {held:.2f} s: cut short. Fetch it again.")
        return held

    def _held_end_s(self) -> float:
        """Return the end of the last packet in the file's own time, without decoding."""
        import av

        self._rewind()
        stream, stamp, end = self.pictures or self.sound, None, 0
        rate = stream.average_rate if stream is self.pictures else None
        usual = round(1 / (rate * stream.time_base)) if rate else 0
        try:
            for packet in self.container.demux(stream):
                if packet.size:  # the last one is empty and only flushes the decoder
                    # Raw streams have no time stamps: there each packet follows the one before.
                    stamp = next((known for known in (packet.pts, packet.dts) if known is not None), end)
                    end = max(end, stamp + (packet.duration or usual))
        except av.error.FFmpegError as error:
            self.broken = _cause(error)
        if stamp is None:
            raise MediaError(f"{self.path}: not one packet can be read. Fetch it again.")
        return float(end * stream.time_base)

    def decode(self, stream: "av.VideoStream | av.AudioStream", from_s: float) -> Iterator[tuple[float, Any]]:
        """Yield (time, frame) in order of display, the first at or before `from_s` wherever the file has one.

        Ends with the stream, or at the first error, whose text is then left in `self.broken`.
        """
        if stream.codec_context is None:
            self.broken = "this installation has no decoder for it"
            return
        index, zero_s = stream.index, self.start_s
        for back in SEEK_BACK_S if from_s > 0 else ():
            frames = self._decode_forward(index, from_s - back, zero_s)
            first = next(frames, None)
            if first is not None and first[0] <= from_s + EPSILON_S:
                yield first
                yield from frames
                return
        yield from self._decode_forward(index, None, zero_s)

    def converted(self, frame: "av.VideoFrame", form: str) -> "np.ndarray":
        """Return a frame as an array, full range, in FFmpeg's pixel format `form`; one set-up serves the whole file."""
        from av.video.reformatter import VideoReformatter

        if form not in self._converters:
            self._converters[form] = VideoReformatter()
        return self._converters[form].reformat(frame, format=form, threads=1).to_ndarray()

    def _decode_forward(self, index: int, from_s: float | None, zero_s: float) -> Iterator[tuple[float, Any]]:
        """Decode from the key frame before `from_s`, or from the beginning; times never run backwards."""
        import av

        self.broken = ""
        try:
            self._rewind() if from_s is None or from_s <= 0 else self._seek(index, from_s + zero_s)
            stream = self.container.streams[index]
            tick, time, due = float(stream.time_base), -math.inf, 0.0
            for frame in self.container.decode(stream):
                stamp = frame.dts if frame.pts is None else frame.pts
                time = max(time, due if stamp is None else stamp * tick - zero_s)
                due = time + (frame.duration or 0) * tick
                yield time, frame
        except av.error.FFmpegError as error:
            self.broken = _cause(error)

    def _seek(self, index: int, stamp_s: float) -> None:
        stream = self.container.streams[index]
        self.container.seek(round(stamp_s / stream.time_base), stream=stream)
        self._used = True

    def _rewind(self) -> None:
        """Go back to the beginning by opening the file anew, since not every format can seek."""
        if self._used and self._container is not None:
            self._container.close()
            self._container = None
        self._used = True


def _cause(error: OSError) -> str:
    return error.strerror or str(error)
