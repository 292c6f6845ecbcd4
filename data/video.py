"""Video: the frames on display at given times, upright, as RGB."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import MediaError
from .media import EPSILON_S, Media
from .views import View, crop

if TYPE_CHECKING:
    import av


@dataclass(frozen=True)
class Shown:
    """One frame, the places in the list of times at which it is on display, and its neighbours (None at an end)."""

    places: list[int]
    time: float
    frame: "av.VideoFrame"
    before: "tuple[float, av.VideoFrame] | None"
    after: "tuple[float, av.VideoFrame] | None"


def frames_at(media: Media, times: Sequence[float], peeks: Sequence[float] = ()) -> Iterator[Shown]:
    """Decode forward once and yield each frame that is on display at one of `times` or `peeks`, in order.

    The frame on display at t is the last that starts at or before t (give or take EPSILON_S), the first one for
    earlier times.  The last frame stays on display for its own duration and, as tables round, for one more; a later
    one of `times` raises MediaError, for a later one of `peeks` the last frame will do.  Places count through `times`,
    then `peeks`.  Raises MediaError if no frame can be decoded, or if a frame asked for is flagged as damaged.
    """
    wanted = np.concatenate([np.asarray(times, float), np.asarray(peeks, float)])
    order = np.argsort(wanted, kind="stable")
    ascending, done = wanted[order], 0
    before = shown = None
    for after in media.decode(media.pictures, float(ascending[0])):
        if shown is not None:
            upto = int(np.searchsorted(ascending, after[0] - EPSILON_S))
            if upto > done:
                yield _shown(media, order[done:upto], before, shown, after)
                done = upto
            if done == len(wanted):
                return
        # Frames that share one time stamp replace each other: only the last of them is ever seen.
        before = before if shown is not None and after[0] <= shown[0] else shown
        shown = after
    if shown is None:
        cause = f" ({media.broken})" if media.broken else ""
        raise MediaError(f"{media.path}: no frame can be decoded{cause}. Fetch the file again.")
    _check_end(media, max(times), before, shown)
    if done < len(wanted):
        yield _shown(media, order[done:], before, shown, None)


def _shown(media: Media, places: np.ndarray, before: tuple | None, shown: tuple, after: tuple | None) -> Shown:
    time, frame = shown
    if frame.is_corrupt:
        raise MediaError(f"{media.path}: the frame at {time:.3f} s is damaged. Fetch the file again.")
    return Shown(places.tolist(), time, frame, before, after)


def _check_end(media: Media, latest: float, before: tuple | None, last: tuple) -> None:
    """Raise MediaError if `latest` lies more than one frame after the end of the last frame."""
    time, frame = last
    rate = frame.time_base and media.pictures.average_rate
    lasts = float(frame.duration * frame.time_base) if frame.duration else 0.0
    lasts = lasts or (float(1 / rate) if rate else 0.0) or (time - before[0] if before else 0.0)
    if latest > time + 2 * lasts + EPSILON_S:
        cause = f"decoding breaks off ({media.broken})" if media.broken else "the video ends"
        step = "Fetch the file again" if media.broken else "Correct start_s and stop_s, or fetch the file again"
        raise MediaError(f"{media.path}: frame at {latest:.3f} s wanted, {cause} at {time + lasts:.3f} s. {step}.")


def to_rgb(media: Media, frame: "av.VideoFrame") -> np.ndarray:
    """Return a frame as it is meant to be seen, uint8 [H, W, 3] RGB, full range, turned and mirrored."""
    return _upright(media.converted(frame, "rgb24"), frame)


def to_grey(media: Media, frame: "av.VideoFrame", short_side: int) -> np.ndarray:
    """Return a frame as uint8 [H, W] grey values, upright, shrunk until its short side is at most `short_side`."""
    import cv2

    grey = media.converted(frame, "gray")
    factor = short_side / min(grey.shape)
    if factor < 1:
        shape = [max(1, round(side * factor)) for side in grey.shape]
        grey = cv2.resize(grey, (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(_upright(grey, frame))


def _upright(picture: np.ndarray, frame: "av.VideoFrame") -> np.ndarray:
    """Turn and mirror by the frame's display matrix, of which PyAV's `rotation` tells the turn only.

    The matrix sends x, y to a x + c y, b x + d y in 16.16 fixed point; only its eight upright forms exist in practice.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
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
    picture = crop(picture, view, size)
    picture = picture[:, ::-1] if view.flip else picture
    return picture.transpose(2, 0, 1)  # [3, S, S]
