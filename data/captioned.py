"""A film with captions drawn into its pictures: every frame at its own time, the sound as it was."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import ConfigError, MediaError, cause
from .media import EPSILON_S, Frame, Media
from .publish import written_by
from .raw import open_film
from .soundtrack import Soundtrack
from .video import Converter, Film

if TYPE_CHECKING:
    import av
    from PIL.ImageFont import FreeTypeFont

FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
TICK = Fraction(1, 90_000)
# The height of a line of text over that of the picture; text that is wider than the picture gets smaller.
LINE_SHARE, LEAST_PX = 1 / 18, 9
SHADE = 0.6  # how dark the ground of the text is


@dataclass(frozen=True)
class Caption:
    """Lines of text, drawn into the frames that are first on display from start (seconds) to before stop."""

    start_s: float
    stop_s: float
    lines: tuple[str, ...]


def require_format(path: Path) -> str:
    """Return FFmpeg's name of the format of a file to be written; raises ConfigError if its suffix is another."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: a video is written as {', '.join(FORMATS)}. Choose another name.")
    return FORMATS[path.suffix.lower()]


def write_captioned(
    video: Path, fps: float | None, captions: Sequence[Caption], path: Path, count: Callable[[int], None]
) -> int:
    """Write the film `video` with captions drawn into it to `path`, as H.264; return the number of frames.

    captions: ascending, none over another.  fps: of numbered frames.  count: is told of each whole second written.
    Frames keep their times and are upright; sides that are odd grow by a pixel.  Sound is copied if the format takes
    it, else encoded as AAC.  Raises MediaError if a frame or the sound cannot be read, ConfigError as
    `require_format`, and CacheError if the disk is full; `path` is then as it was.
    """
    import av

    form = require_format(path)
    with open_film(video, fps) as film, written_by(path) as half:
        if not film.has_pictures:
            raise MediaError(f"{video}: has no picture to draw into. Leave the video out.")
        try:
            with av.open(str(half), "w", format=form) as out:
                return _write(film, captions, out, count)
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise MediaError(f"{path}: cannot be encoded: {cause(error)}. Choose another format.") from None


def _write(
    film: Film, captions: Sequence[Caption], out: "av.container.OutputContainer", count: Callable[[int], None]
) -> int:
    pictures, drawn, done_s, n_frames, end_s = None, _Drawing(captions), 0, 0, 0.0
    with ExitStack() as opened:
        sound = None
        if isinstance(film, Media) and film.has_sound:
            # Opened a second time: both are read side by side, so that memory does not grow with the film.
            sound = Soundtrack(opened.enter_context(Media(film.path)), film.start_s, out)
        for frame in _lasting(film):
            picture = drawn.picture(frame)
            pictures = pictures or _Pictures(out, picture.shape, _aspect(film, frame, picture))
            pictures.add(picture, frame, sound.lead_s if sound else 0.0)
            if sound:
                sound.write_to(frame.time)
            if int(frame.time) > done_s:
                count(int(frame.time) - done_s)
                done_s = int(frame.time)
            n_frames, end_s = n_frames + 1, frame.time + frame.lasts
        # Numbered frames always end where one is missing: the question is whether there are more behind it.
        broken = film.broken and (isinstance(film, Media) or end_s < film.duration_s - EPSILON_S)
        if broken or pictures is None:
            reason = film.broken or "not one frame"
            raise MediaError(f"{film.path}: ends at {end_s:.3f} s before its time: {reason}. Fetch it again.")
        pictures.end()
        if sound:
            sound.write_to(float("inf"))
    return n_frames


def _lasting(film: Film) -> Iterator[Frame]:
    """Yield the frames that are ever seen: of those that share one moment, the last."""
    held = None
    for frame in film.frames(0.0):
        if held is not None and round(frame.time / TICK) > round(held.time / TICK):
            yield held
        held = frame
    if held is not None:
        yield held


def _aspect(film: Film, frame: Frame, picture: np.ndarray) -> Fraction:
    """Return the width of a pixel over its height, of a picture as it is drawn: upright."""
    pictures = film.pictures if isinstance(film, Media) else None
    stated = (pictures.sample_aspect_ratio if pictures else None) or Fraction(1)
    is_turned = (frame.picture.height, frame.picture.width) != picture.shape[:2]
    return 1 / stated if is_turned else stated


class _Pictures:
    """The video stream of a file to be written, fed frame by frame."""

    def __init__(self, out: "av.container.OutputContainer", shape: tuple[int, ...], aspect: Fraction) -> None:
        height, width = shape[:2]
        self._out = out
        self._lasts: dict[int | None, int] = {}
        stream = self._stream = out.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.time_base = stream.codec_context.time_base = TICK
        stream.codec_context.sample_aspect_ratio = aspect
        # Players guess the colours of an unmarked stream by its size; what is written is BT.601, limited range.
        stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1

    def add(self, picture: np.ndarray, frame: Frame, lead_s: float) -> None:
        """Encode a picture [H, W, 3], shown from `lead_s` after the time of the frame it was drawn into."""
        import av
        import cv2

        stream, (height, width) = self._stream, picture.shape[:2]
        if (height + height % 2, width + width % 2) != (stream.height, stream.width):  # a size that changes midway
            picture = cv2.resize(picture, (stream.width, stream.height), interpolation=cv2.INTER_AREA)
        rest = (0, stream.height - picture.shape[0], 0, stream.width - picture.shape[1])
        padded: np.ndarray = cv2.copyMakeBorder(picture, *rest, cv2.BORDER_REPLICATE) if any(rest) else picture
        image = av.VideoFrame.from_ndarray(padded, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="smpte170m", dst_color_range="MPEG"
        )
        image.pts, image.time_base = round((frame.time + lead_s) / TICK), TICK
        self._lasts[image.pts] = round(frame.lasts / TICK)
        self._mux(image)

    def end(self) -> None:
        """Write what the encoder has kept."""
        self._mux(None)

    def _mux(self, image: "av.VideoFrame | None") -> None:
        for packet in self._stream.encode(image):
            # The last frame stays for as long as it did, which no later one tells.
            packet.duration = self._lasts.pop(packet.pts, 0) or packet.duration
            self._out.mux(packet)


class _Drawing:
    """Draws captions; the text of each is set once, for all frames that show it."""

    def __init__(self, captions: Sequence[Caption]) -> None:
        self._captions, self._at = captions, 0
        self._converter = Converter()
        self._set: tuple[tuple[str, ...], tuple[int, ...], np.ndarray] | None = None

    def picture(self, frame: Frame) -> np.ndarray:
        """Return the picture of a frame, uint8 [H, W, 3], upright, with the caption of its time in its lower left."""
        picture = self._converter.rgb(frame).copy()
        while self._at < len(self._captions) and self._captions[self._at].stop_s <= frame.time:
            self._at += 1
        if self._at == len(self._captions) or self._captions[self._at].start_s > frame.time:
            return picture
        lines = self._captions[self._at].lines
        if self._set is None or self._set[:2] != (lines, picture.shape):
            self._set = (lines, picture.shape, set_text(lines, picture.shape[1], picture.shape[0]))
        text = self._set[2]
        corner = picture[picture.shape[0] - text.shape[0] :, : text.shape[1]]
        # White on a darkened ground: legible on any picture.
        ground = corner * (1 - SHADE)
        corner[:] = np.rint(ground + (255 - ground) * text[..., None]).astype(np.uint8)
        return picture


def set_text(lines: Sequence[str], width: int, height: int) -> np.ndarray:
    """Return lines of text as a patch [h, w] of 0..1 (1: ink) that fits into a picture of width x height.

    Lines of a height that suits the picture's; all of them are set smaller, down to 9 pixels, if one does not fit, and
    what is too long even then is cut off.
    """
    from PIL import Image, ImageDraw

    size = max(LEAST_PX, round(height * LINE_SHARE))
    while size > LEAST_PX and not _fits(_font(size), lines, width, height):
        size -= 1
    font, room = _font(size), size // 3
    line_px = sum(font.getmetrics())
    longest = max((round(font.getlength(line)) for line in lines), default=0)
    area = (min(width, longest + 2 * room), min(height, line_px * len(lines) + 2 * room))
    patch = Image.new("L", area)
    draw = ImageDraw.Draw(patch)
    for place, line in enumerate(lines):
        draw.text((room, room + place * line_px), line, fill=255, font=font)
    return np.asarray(patch, np.float32) / 255


def _fits(font: "FreeTypeFont", lines: Sequence[str], width: int, height: int) -> bool:
    room = 2 * (font.size // 3)
    longest = max((font.getlength(line) for line in lines), default=0)
    return longest + room <= width and sum(font.getmetrics()) * len(lines) + room <= height / 2


def _font(size: int) -> "FreeTypeFont":
    """Return the font of the plots, which has the letters of most languages."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
