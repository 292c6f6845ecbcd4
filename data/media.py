"""Media files of any container that PyAV reads: opening, the clock, and decoding forward from a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from .errors import MediaError, cause
from .places import StoredFile, exists, is_local

if TYPE_CHECKING:
    import av
    import numpy as np

# Clip tables and WebM round times to milliseconds: a time this little before a frame means that frame.
EPSILON_S = 6e-4
# How far before the wanted time a seek may have to go: some indexes know decoding times only, some are coarse.
SEEK_BACK_S = (0.0, 2.0, 10.0)
# Decoding on for so many seconds costs about as much as going back to a key frame, where no index tells.
FAR_S = 4.0
# Larger than any camera's picture; FFmpeg would allocate whatever a damaged header asks for.
MOST_PIXELS = 2**27
# Formats that are lists of other files: what a clip's file says must not choose which files are read.
LISTS = {"concat", "concatf", "hls", "dash", "image2", "imf"}
# A file may state a duration this much longer than what it holds (rounding, delays) before it counts as cut short.
STATED_SLACK_S = 0.5


@dataclass(frozen=True)
class Reading:
    """What one modality of one clip gave: its array if `state` is PRESENT, else None and the reason."""

    state: int
    array: "np.ndarray | None"
    reason: str = ""


def tick_of(stream: "av.stream.Stream") -> Fraction:
    """Return the seconds that one unit of a stream's time stamps stands for."""
    assert stream.time_base is not None  # FFmpeg gives one to each stream that it opens
    return stream.time_base


class Frame:
    """One frame of a film: when it is shown, for how long it is meant to stay (0: unknown), and its picture."""

    def __init__(self, time: float, lasts: float, load: "Callable[[], av.VideoFrame]") -> None:
        self.time, self.lasts, self._load = time, lasts, load

    @cached_property
    def picture(self) -> "av.VideoFrame":
        """The decoded picture; raises MediaError if it is damaged."""
        return self._load()


class Media:
    """One file, opened when first needed and at most once at a time; used in a `with` block.

    Its clock starts with its first picture, or with its first sound where it has no pictures; all times are seconds
    on that clock.  Every method raises MediaError, with the file and the cause, when the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = ""
        self._container: av.container.InputContainer | None = None
        self._file: StoredFile | None = None
        self._used = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._container is not None:
            self._container.close()
        if self._file is not None:
            self._file.close()

    @property
    def container(self) -> "av.container.InputContainer":
        """The open file."""
        if self._container is None:
            self._container = self._open()
        return self._container

    def _open(self) -> "av.container.InputContainer":
        import av

        if "*" in str(self.path):
            raise MediaError(f"{self.path}: stands for no file, or for several; expected one. Correct the pattern.")
        try:
            container = av.open(self._source(), "r", metadata_errors="replace")
        except av.error.FFmpegError as error:
            raise MediaError(f"{self.path}: not a media file: {cause(error)}. Fetch it again.") from None
        if LISTS & {*container.format.name.split(",")}:
            container.close()
            raise MediaError(f"{self.path}: is a list of other files, not media. Name the files themselves.")
        for stream in (*container.streams.video, *container.streams.audio):
            if stream.codec_context is not None:
                # One thread: where a damaged file breaks off must not depend on the machine.
                stream.codec_context.thread_count = 1
                stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        return container

    def _source(self) -> "str | StoredFile":
        """Return what FFmpeg is to open."""
        if not is_local(self.path):
            self._file = self._file or StoredFile(self.path)
            self._file.seek(0)
            return self._file
        if not exists(self.path):
            raise MediaError(f"{self.path}: no such file. Put it there, or correct the clip table.")
        return str(self.path)

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
            return float(stream.start_time * tick_of(stream))
        return next((time for time, _ in self._decode_forward(stream.index, None, 0.0)), 0.0)

    @property
    def frame_s(self) -> float:
        """Seconds that a frame usually lasts; 0 where there is no picture, or no telling."""
        rate = self.pictures and self.pictures.average_rate
        return float(1 / rate) if rate else 0.0

    @property
    def stated_s(self) -> float:
        """Seconds that the header promises: quick, and less to be believed than `duration_s`, its fallback."""
        stream = self.pictures or self.sound
        if stream is not None and stream.duration:
            return float(stream.duration * tick_of(stream))
        return self.duration_s if not self.container.duration else self.container.duration / 1e6

    @cached_property
    def duration_s(self) -> float:
        """Seconds of picture (of sound, where there is no picture), counted over the packets: headers may be wrong.

        Raises MediaError if the file's header promises much more than the file holds: it has been cut short.
        """
        held = self._held_end_s() - self.start_s
        stream = self._require_content()  # only now: both may have opened the file anew
        stated = float((stream.duration or 0) * tick_of(stream))
        if held <= 0:  # a single packet that does not say how long it lasts
            return stated
        if stated > held + STATED_SLACK_S:
            raise MediaError(f"{self.path}: says {stated:.2f} s, holds {held:.2f} s: cut short. Fetch it again.")
        return held

    def _held_end_s(self) -> float:
        """Return the end of the last packet in the file's own time, without decoding."""
        import av

        self._rewind()
        stream, stamp, end = self._require_content(), None, 0
        rate, tick = stream.average_rate if stream is self.pictures else None, tick_of(stream)
        usual = round(1 / (rate * tick)) if rate else 0
        try:
            for packet in self.container.demux(stream):
                if packet.size:  # the last one is empty and only flushes the decoder
                    # Raw streams have no time stamps: there each packet follows the one before.
                    stamp = next((known for known in (packet.pts, packet.dts) if known is not None), end)
                    end = max(end, stamp + (packet.duration or usual))
        except (av.error.FFmpegError, IndexError) as error:  # IndexError: damage adds or removes a stream
            self.broken = cause(error)
        if stamp is None:
            raise MediaError(f"{self.path}: not one packet can be read. Fetch it again.")
        return float(end * tick)

    @property
    def has_pictures(self) -> bool:
        """Whether there is a video stream, cover pictures aside."""
        self._require_content()
        return self.pictures is not None

    @property
    def has_sound(self) -> bool:
        """Whether there is an audio stream."""
        self._require_content()
        return self.sound is not None

    def _require_content(self) -> "av.VideoStream | av.AudioStream":
        """Return the stream whose clock it is; raise MediaError for a file without any: nothing is absent by design."""
        if (stream := self.pictures or self.sound) is None:
            raise MediaError(f"{self.path}: holds neither picture nor sound. Fetch it again, or correct the table.")
        return stream

    def worth_seeking(self, from_s: float, to_s: float) -> bool:
        """Say whether a key frame lies between two moments, by the file's index; without one, whether they are far."""
        stream = self.pictures
        assert stream is not None  # nobody seeks what cannot be seen
        tick, zero_s, index = float(tick_of(stream)), self.start_s, stream.index_entries
        if len(index) < 2:  # no index, or one that is only read as the file is
            return to_s - from_s > FAR_S
        key = index.search_timestamp(round((to_s + zero_s) / tick))
        return key >= 0 and index[key].timestamp * tick - zero_s > from_s

    def frames(self, from_s: float) -> Iterator[Frame]:
        """Yield the frames of the video in order of display, as `decode` does."""
        usual, stream = self.frame_s, self.pictures
        assert stream is not None  # `has_pictures` said so
        for time, picture in self.decode(stream, from_s):
            lasts = float(picture.duration * picture.time_base) if picture.duration and picture.time_base else 0.0
            yield Frame(time, lasts or usual, partial(self._intact, time, picture))

    def _intact(self, time: float, picture: "av.VideoFrame") -> "av.VideoFrame":
        if picture.is_corrupt:
            raise MediaError(f"{self.path}: the frame at {time:.3f} s is damaged. Fetch the file again.")
        return picture

    def sound_frames(self, from_s: float) -> "Iterator[tuple[float, av.AudioFrame]]":
        """Yield (time, frame) of the sound, as `decode` does."""
        stream = self.sound
        assert stream is not None  # `has_sound` said so
        return self.decode(stream, from_s)

    def decode(self, stream: "av.VideoStream | av.AudioStream", from_s: float) -> Iterator[tuple[float, Any]]:
        """Yield (time, frame) in order of display, the first at or before `from_s` wherever the file has one.

        Ends with the stream, or at the first error, whose text is then left in `self.broken`.  Raises MediaError if
        there is no decoder for it.
        """
        if stream.codec_context is None:
            # The environment lacks something, not the file: to fetch it again would be of no use.
            raise MediaError(
                f"{self.path}: this installation of PyAV has no decoder for its {stream.type}; the file may be sound. "
                "Convert it, or install a PyAV that has one."
            )
        index, zero_s = stream.index, self.start_s
        for back in SEEK_BACK_S if from_s > 0 else ():
            frames = self._decode_forward(index, from_s - back, zero_s)
            first = next(frames, None)
            if first is not None and first[0] <= from_s + EPSILON_S:
                yield first
                yield from frames
                return
        yield from self._decode_forward(index, None, zero_s)

    def _decode_forward(self, index: int, from_s: float | None, zero_s: float) -> Iterator[tuple[float, Any]]:
        """Decode from the key frame before `from_s`, or from the beginning; times never run backwards."""
        import av

        self.broken = ""
        try:
            self._rewind() if from_s is None or from_s <= 0 else self._seek(index, from_s + zero_s)
            stream = self.container.streams[index]
            tick, time, due = float(tick_of(stream)), -math.inf, 0.0
            frames = cast("Iterator[av.VideoFrame | av.AudioFrame]", self.container.decode(stream))
            for frame in frames:
                stamp = frame.dts if frame.pts is None else frame.pts
                time = max(time, due if stamp is None else stamp * tick - zero_s)
                due = time + (frame.duration or 0) * tick
                yield time, frame
        except (av.error.FFmpegError, IndexError) as error:  # IndexError: damage adds or removes a stream
            self.broken = cause(error)

    def _seek(self, index: int, stamp_s: float) -> None:
        stream = self.container.streams[index]
        self.container.seek(round(stamp_s / tick_of(stream)), stream=stream)
        self._used = True

    def _rewind(self) -> None:
        """Go back to the beginning by opening the file anew, since not every format can seek."""
        if self._used and self._container is not None:
            self._container.close()
            self._container = None
        self._used = True
