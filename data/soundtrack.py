"""The sound track of a media file on its way into another: copied where the format takes it, else encoded as AAC."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import MediaError, cause
from .media import Media, tick_of

if TYPE_CHECKING:
    import av

    Heard = tuple[float, list[av.Packet[av.AudioStream]]]  # when, and what

AAC_HZ = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)


class Soundtrack:
    """Adds an audio stream to `out`, and writes to it what is heard of a film up to a moment.

    media: the film, opened for nothing else and not yet read from.  zero_s: where its clock starts, in the file's own
    time stamps.  lead_s: seconds by which sound begins before the first picture: the clock of `out` starts with the
    earlier of the two, so pictures come that much later.  Raises MediaError if the sound cannot be read.
    """

    def __init__(self, media: Media, zero_s: float, out: "av.container.OutputContainer") -> None:
        self._media, self._out, track = media, out, media.sound
        assert track is not None  # asked for where there is sound
        codec = track.codec_context
        if codec is None:
            raise MediaError(f"{media.path}: this installation of PyAV has no decoder for its sound. Convert the file.")
        begins_s = zero_s if track.start_time is None else float(track.start_time * tick_of(track))
        self.lead_s = max(0.0, zero_s - begins_s)
        self._shift_s = self.lead_s - zero_s
        if codec.codec.canonical_name in out.supported_codecs:
            self._stream, self._packets = out.add_stream_from_template(track), self._copy(track)
        else:
            rate = codec.sample_rate if codec.sample_rate in AAC_HZ else AAC_HZ[0]
            layout = "mono" if codec.layout.nb_channels == 1 else "stereo"
            self._stream, self._packets = out.add_stream("aac", rate=rate, layout=layout), self._encode()
        self._next: Heard | None = None

    def write_to(self, time_s: float) -> None:
        """Write the sound up to a moment of the film."""
        while True:
            self._next = self._next or next(self._packets, None)
            if self._next is None or self._next[0] > time_s + self.lead_s:
                return
            for packet in self._next[1]:
                self._out.mux(packet)
            self._next = None

    def _copy(self, track: "av.AudioStream") -> "Iterator[Heard]":
        """Yield (time, packets) as they are in the file."""
        import av

        tick, due = tick_of(track), 0
        shift = round(self._shift_s / tick)
        try:
            for packet in self._media.container.demux(track):
                if not packet.size:  # the last one only flushes a decoder
                    continue
                stamp = next((known for known in (packet.pts, packet.dts) if known is not None), due)
                due = stamp + (packet.duration or 0)
                packet.pts, packet.dts = stamp + shift, (stamp if packet.dts is None else packet.dts) + shift
                packet.stream = self._stream
                yield float(packet.pts * tick), [packet]
        except (av.error.FFmpegError, IndexError) as error:  # IndexError: damage adds or removes a stream
            raise MediaError(f"{self._media.path}: its sound breaks off: {cause(error)}. Fetch it again.") from None

    def _encode(self) -> "Iterator[Heard]":
        """Yield (time, packets) of AAC."""
        time = 0.0
        for time, frame in self._media.sound_frames(-1.0):
            # Times of `Media` are those of its clock, which starts with the first picture.
            frame.pts = round((time + self.lead_s) / frame.time_base) if frame.time_base else None
            yield time + self.lead_s, self._stream.encode(frame)
        if self._media.broken:
            raise MediaError(f"{self._media.path}: its sound breaks off: {self._media.broken}. Fetch it again.")
        yield time + self.lead_s, self._stream.encode(None)
