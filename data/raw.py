"""Raw clips: what each modality of a clip looks like in one view, or the reason why it is not there.

This file alone knows which modality comes from which source: video and computed flow from one pass over the film
(a media file, a folder or a pack of numbered frames), released flow from u/v pictures, audio from the video's sound
track or the audio source, detections from the detections source.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .annotations import Clip
from .audio import Sound, read_audio
from .config import DataConfig
from .detections import has_boxes, place_boxes, read_boxes
from .errors import MediaError
from .media import Media, Reading
from .modality import ABSENT, FAILED, PRESENT
from .packs import PackedSound, open_frames, split_pack
from .pictures import Asked, read_pictures
from .places import is_folder, located
from .released import read_released
from .video import Converter, Film, frames_at
from .views import View, view_times

__all__ = ["Reading", "read_clip", "read_clips"]


@dataclass(frozen=True)
class _Order:
    """One clip in one view: the modalities to read, and the moments [T] at which they are sampled."""

    clip: Clip
    view: View
    asked: tuple[str, ...]
    span: tuple[float, float]
    times: np.ndarray


def read_clip(clip: Clip, view: View, modalities: tuple[str, ...], data: DataConfig) -> dict[str, Reading]:
    """Read the view of a clip in each of `modalities`; shapes as `DataConfig.input_shape` says.

    PRESENT, with the array: video and flow uint8, audio and detections float32.
    ABSENT by design: an empty cell in the modality's column; a file without picture or without sound track; no column
    of detections, a file of them that leaves the video out, or no box within the clip.
    FAILED: anything else, with a reason that names the file.  What one modality gives does not depend on the others.
    """
    return read_clips([clip], [view], [modalities], data)[0]


def read_clips(
    clips: Sequence[Clip], views: Sequence[View], modalities: Sequence[tuple[str, ...]], data: DataConfig
) -> list[dict[str, Reading]]:
    """Read clips of one video, those near each other in one pass; each comes out as `read_clip` gives it alone."""
    out: list[dict[str, Reading]] = []
    orders: list[_Order] = []
    with open_film(clips[0].video, clips[0].rates.get("video")) as film:
        for clip, view, names in zip(clips, views, modalities, strict=True):
            asked = tuple(name for name in names if clip.sources.get(name, clip.video) is not None)
            out.append({name: _absent(f"the {name} cell of the table is empty") for name in names if name not in asked})
            try:
                span = _span(clip, film)
            except MediaError as error:
                out[-1] |= dict.fromkeys(asked, Reading(FAILED, None, str(error)))
                asked, span = (), (0.0, 1.0)
            orders.append(_Order(clip, view, asked, span, view_times(view, *span)))
        for found, pictures in zip(out, _read_pictures(film, orders, data), strict=True):
            found |= pictures
        for found, order in zip(out, orders, strict=True):
            found |= _read_rest(film, order, data)
    return [{name: found[name] for name in names} for found, names in zip(out, modalities, strict=True)]


def open_film(path: Path, fps: float | None) -> AbstractContextManager[Film]:
    """Return the frames of a video, not opened yet: a media file, a folder of numbered frames or `pack.h5::dataset`."""
    path = located(path)
    return open_frames(path, fps) if split_pack(path) or is_folder(path) else Media(path)


def _span(clip: Clip, film: Film) -> tuple[float, float]:
    """Return start and stop of a clip; one without a stop lasts as long as its video."""
    stop_s = film.duration_s if clip.stop_s is None else clip.stop_s
    if stop_s <= clip.start_s:
        raise MediaError(f"{clip.video}: the clip starts at {clip.start_s:.3f} s, the file ends at {stop_s:.3f} s.")
    return clip.start_s, stop_s


def _attempt(read: Callable[[], Reading]) -> Reading:
    try:
        return read()
    except MediaError as error:
        return Reading(FAILED, None, str(error))


def _absent(reason: str) -> Reading:
    return Reading(ABSENT, None, reason)


def _read_pictures(film: Film, orders: list[_Order], data: DataConfig) -> list[dict[str, Reading]]:
    """Read video, computed flow or both of every clip that asks for them."""
    names = [tuple(name for name in ("video", "flow") if _is_decoded(name, order, data)) for order in orders]
    due = [at for at, wanted in enumerate(names) if wanted]
    out: list[dict[str, Reading]] = [{} for _ in orders]
    try:
        if due and not film.has_pictures:
            absent = _absent(f"{film.path} has no video stream")
            return [dict.fromkeys(wanted, absent) for wanted in names]
        asked = [Asked(names[at], orders[at].times, orders[at].span[1], orders[at].view) for at in due]
        for at, found in zip(due, read_pictures(film, asked, data) if due else [], strict=True):
            out[at] = found
    except MediaError as error:
        return [dict.fromkeys(wanted, Reading(FAILED, None, str(error))) for wanted in names]
    return out


def _is_decoded(name: str, order: _Order, data: DataConfig) -> bool:
    computed = data.flow_method != "released" and order.clip.sources.get("flow") is None
    return name in order.asked and (name == "video" or (name == "flow" and computed))


def _read_rest(film: Film, order: _Order, data: DataConfig) -> dict[str, Reading]:
    """Read what does not come from the film's pictures."""
    readers = {"flow": _read_flow, "audio": _read_audio, "detections": _read_detections}
    due = [name for name in order.asked if name in readers and not _is_decoded(name, order, data)]
    return {name: _attempt(partial(readers[name], film, order, data)) for name in due}


def _read_flow(film: Film, order: _Order, data: DataConfig) -> Reading:
    source, fps = order.clip.sources.get("flow"), order.clip.rates.get("flow")
    if source is None:
        raise MediaError(f"{film.path}: no released flow is named. Set flow_files, or have flow computed.")
    if data.flow_method != "released":
        raise MediaError(f"{source}: flow_method {data.flow_method} does not read it. Set released or drop the column.")
    return Reading(PRESENT, read_released(located(source), fps, order.times, order.view, data))


def _read_audio(film: Film, order: _Order, data: DataConfig) -> Reading:
    own = order.clip.sources.get("audio")
    if own is None:
        if not isinstance(film, Media):
            return _absent(f"{film.path} holds frames and no sound")
        if not film.has_sound:
            return _absent(f"{film.path} has no sound track")
    # Opened anew for each clip: some decoders draw noise, from a state that seeking does not set back.
    with _open_sound(located(own or film.path), order.clip.rates.get("audio")) as recording:
        if not recording.has_sound:
            raise MediaError(f"{own}: has no sound track. Leave its cell in the table empty, or name another file.")
        return Reading(PRESENT, read_audio(recording, order.times, order.span, order.view, data))


def _open_sound(path: Path, rate: float | None) -> AbstractContextManager[Sound]:
    return PackedSound(path, rate) if split_pack(path) else Media(path)


def _read_detections(film: Film, order: _Order, data: DataConfig) -> Reading:
    clip, (start_s, stop_s) = order.clip, order.span
    source = clip.sources.get("detections")
    if source is None:
        return _absent("the table has no detections column")
    boxes = read_boxes(source, (clip.video_id or clip.video.stem, clip.clip_id))
    if boxes is None:
        return _absent(f"{source} has no boxes of {clip.video_id or clip.video.stem}")
    if not has_boxes(boxes, start_s, stop_s):
        return _absent(f"{source} has no box between {start_s:.3f} and {stop_s:.3f} s")
    size = partial(_picture_size, film, order.times[0])
    return Reading(PRESENT, place_boxes(boxes, order.times, order.view, data.max_boxes, size))


def _picture_size(film: Film, time: float) -> tuple[int, int]:
    """Return width and height of the upright video."""
    if not film.has_pictures:
        raise MediaError(f"{film.path}: has no picture to take the size from. State width and height with the boxes.")
    height, width, _ = Converter().rgb(next(frames_at(film, [time])).frame).shape
    return width, height
