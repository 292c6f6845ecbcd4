"""Video: the frames on display at given times, upright, as RGB or grey."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .config import Box
from .errors import MediaError
from .media import EPSILON_S, Frame
from .views import View, crop, cut

if TYPE_CHECKING:
    import av
    from av.video.reformatter import VideoReformatter


class Film(Protocol):
    """Whatever holds the frames of one video: a media file, a folder or a pack of numbered frames."""

    path: Path
    broken: str  # why the last iteration over `frames` ended early, if it did

    @property
    def has_pictures(self) -> bool:
        """Whether there is anything to see."""

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last."""

    @property
    def stated_s(self) -> float:
        """The same, as quickly as it can be told."""

    @property
    def frame_s(self) -> float:
        """Seconds that a frame usually lasts; 0 where there is no telling."""

    def frames(self, from_s: float) -> Iterator[Frame]:
        """Yield frames in order of display, the first at or before `from_s` wherever there is one."""

    def worth_seeking(self, from_s: float, to_s: float) -> bool:
        """Say whether starting anew at `to_s` is cheaper than going on from `from_s`."""


@dataclass(frozen=True)
class Shown:
    """One frame, the places in the list of times at which it is on display, and its neighbours (None at an end)."""

    places: list[int]
    frame: Frame
    before: Frame | None
    after: Frame | None

    @property
    def time(self) -> float:
        """When the frame is first on display, in seconds."""
        return self.frame.time


# Moments in seconds.
Times = Sequence[float] | np.ndarray


def frames_at(film: Film, times: Times, peeks: Times = ()) -> Iterator[Shown]:
    """Decode forward once and yield each frame that is on display at one of `times` or `peeks`, in order.

    The frame on display at t is the last that starts at or before t (give or take EPSILON_S), the first one for
    earlier times.  The last frame stays on display for its own duration and, as tables round, for one more; a later
    one of `times` raises MediaError, for a later one of `peeks` the last frame will do.  Places count through `times`,
    then `peeks`.  Raises MediaError if no frame can be decoded.
    """
    wanted = np.concatenate([np.asarray(times, float), np.asarray(peeks, float)])
    order = np.argsort(wanted, kind="stable")
    ascending, done = wanted[order], 0
    before = shown = None
    for after in film.frames(float(ascending[0])):
        if shown is not None:
            upto = int(np.searchsorted(ascending, after.time - EPSILON_S))
            if upto > done:
                yield Shown(order[done:upto].tolist(), shown, before, after)
                done = upto
            if done == len(wanted):
                return
        # Frames that share one time stamp replace each other: only the last of them is ever seen.
        before = before if shown is not None and after.time <= shown.time else shown
        shown = after
    if shown is None:
        cause = f" ({film.broken})" if film.broken else ""
        raise MediaError(f"{film.path}: no frame can be decoded{cause}. Fetch the file again.")
    _check_end(film, max(times), before, shown)
    if done < len(wanted):
        yield Shown(order[done:].tolist(), shown, before, None)


def _check_end(film: Film, latest: float, before: Frame | None, last: Frame) -> None:
    """Raise MediaError if `latest` lies more than one frame after the end of the last frame."""
    lasts = last.lasts or (last.time - before.time if before else 0.0)
    if latest > last.time + 2 * lasts + EPSILON_S:
        cause = f"decoding breaks off ({film.broken})" if film.broken else "the video ends"
        step = "Fetch the file again" if film.broken else "Correct start_s and stop_s, or fetch the file again"
        raise MediaError(f"{film.path}: frame at {latest:.3f} s wanted, {cause} at {last.time + lasts:.3f} s. {step}.")


class Converter:
    """Turns decoded frames into arrays; one set-up serves all frames of one form, one array all clips that share it."""

    def __init__(self) -> None:
        self._reformatters: dict[str, VideoReformatter] = {}
        self._latest: dict[str, tuple[Frame, np.ndarray]] = {}

    def rgb(self, frame: Frame, short_side: int = 0, box: Box | None = None) -> np.ndarray:
        """Return a frame as it is meant to be seen, uint8 [H, W, 3] RGB, full range, turned and mirrored.

        box: the part to return.  short_side: what to shrink it to, if it is larger; 0 leaves it as it is.
        """
        return _shrunk(cut(_upright(self._array(frame, "rgb24"), frame.picture), box), short_side)

    def grey(self, frame: Frame, short_side: int = 0, box: Box | None = None) -> np.ndarray:
        """Do as `rgb`, uint8 [H, W]."""
        return _shrunk(cut(_upright(self._array(frame, "gray"), frame.picture), box), short_side)

    def _array(self, frame: Frame, form: str) -> np.ndarray:
        from av.video.reformatter import VideoReformatter

        if form not in self._reformatters:
            self._reformatters[form] = VideoReformatter()
        if self._latest.get(form, (None,))[0] is not frame:
            reformat = self._reformatters[form].reformat
            self._latest[form] = frame, reformat(frame.picture, format=form, threads=1).to_ndarray()
        return self._latest[form][1]


def _shrunk(picture: np.ndarray, short_side: int) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)  # many readers run side by side
    factor = short_side / min(picture.shape[:2])
    if 0 < factor < 1:
        height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(picture)


def _upright(picture: np.ndarray, frame: "av.VideoFrame") -> np.ndarray:
    """Turn and mirror by the frame's display matrix, of which PyAV's `rotation` tells the turn only.

    The matrix sends x, y to a x + c y, b x + d y in 16.16 fixed point; only its eight upright forms exist in practice.
    """
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")  # bytes; PyAV's stubs know motion vectors alone
    except ValueError:  # PyAV cannot list side data of a kind that is newer than itself
        return np.rot90(picture, round(frame.rotation / 90))
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32, 5).tolist()
    if abs(b) > abs(a):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def video_picture(picture: np.ndarray, view: View, size: int) -> np.ndarray:
    """Return the view of a picture [H, W, 3], uint8 [3, size, size]."""
    picture = _colored(crop(picture, view, size), view.color)
    picture = picture[:, ::-1] if view.flip else picture
    return picture.transpose(2, 0, 1)  # [3, S, S]


# ITU-R BT.601, as in the grey value of a picture.
GREY = np.array([0.299, 0.587, 0.114])


def _colored(picture: np.ndarray, color: tuple[float, float, float]) -> np.ndarray:
    """Change brightness, then contrast around mid-grey, then saturation, by factors; 1, 1, 1 changes nothing.

    Each is affine in the colours of a pixel, and so are all three together.  Mid-grey, not a picture's own
    mean, is what contrast turns around: all frames of a clip change alike.
    """
    import cv2

    if color == (1.0, 1.0, 1.0):
        return picture
    brightness, contrast, saturation = color
    mixing = saturation * np.eye(3) + (1 - saturation) * GREY  # [3, 3], each row sums up to 1
    matrix = np.column_stack([brightness * contrast * mixing, np.full(3, 128 * (1 - contrast))])
    return np.clip(np.rint(cv2.transform(picture.astype(np.float32), matrix)), 0, 255).astype(np.uint8)
