"""Raw clips: what each modality of a clip looks like in one view, or the reason why it is not there.

This file alone knows which modality comes from which file: video and flow from one pass over the video, audio from the
video's sound track or the file of the `audio` column, detections from the file of the `detections` column.
"""

from collections.abc import Callable

import numpy as np

from .annotations import Clip
from .audio import read_audio
from .config import DataConfig
from .detections import has_boxes, place_boxes, read_boxes
from .errors import MediaError
from .flow import FlowPairs, flow_picture, pair_ends
from .media import Media, Reading
from .modality import ABSENT, FAILED, PRESENT
from .video import frames_at, to_rgb, video_picture
from .views import View, view_times

__all__ = ["Reading", "read_clip"]


def read_clip(clip: Clip, view: View, modalities: tuple[str, ...], data: DataConfig) -> dict[str, Reading]:
    """Read the view of a clip in each of `modalities`; shapes as `DataConfig.input_shape` says.

    PRESENT, with the array: video and flow uint8, audio and detections float32.
    ABSENT by design: an empty cell in the modality's column; a file without picture or without sound track; no column
    of detections, a file of them that leaves the video out, or no box within the clip.
    FAILED: anything else, with a reason that names the file.  What one modality gives does not depend on the others.
    """
    asked = [name for name in modalities if clip.sources.get(name, clip.video) is not None]
    readings = {name: _absent(f"the {name} cell of the table is empty") for name in modalities if name not in asked}
    with Media(clip.video) as film:
        try:
            span = start_s, stop_s = _span(clip, film)
        except MediaError as error:
            return readings | dict.fromkeys(asked, Reading(FAILED, None, str(error)))
        times = view_times(view, start_s, stop_s)
        pictured = [name for name in ("video", "flow") if name in asked]
        if pictured:
            readings |= _read_pictures(clip, film, pictured, times, (stop_s, view, data))
        if "audio" in asked:
            readings["audio"] = _attempt(lambda: _read_audio(clip, film, times, span, data))
        if "detections" in asked:
            readings["detections"] = _attempt(lambda: _read_detections(clip, film, times, span, view, data))
    return {name: readings[name] for name in modalities}


def _span(clip: Clip, film: Media) -> tuple[float, float]:
    """Return start and stop of a clip; one without a stop lasts as long as its file."""
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


def _read_pictures(
    clip: Clip, film: Media, names: list[str], times: np.ndarray, settings: tuple[float, View, DataConfig]
) -> dict[str, Reading]:
    """Read video, flow or both in one pass over the file."""
    readings = {}
    if clip.sources.get("flow") is not None and "flow" in names:
        reason = f"{clip.sources['flow']}: flow files are not read; leave out the flow column to compute flow."
        readings["flow"] = Reading(FAILED, None, reason)
        names = [name for name in names if name != "flow"]
    try:
        if film.pictures is None:
            return dict.fromkeys(names, _absent(f"{clip.video} has no video stream")) | readings
        video, pairs = _decode_pictures(film, names, times, settings)
    except MediaError as error:
        return dict.fromkeys(names, Reading(FAILED, None, str(error))) | readings
    if "video" in names:
        readings["video"] = Reading(PRESENT, video)
    if "flow" in names:
        readings["flow"] = _attempt(lambda: Reading(PRESENT, _flow_pictures(pairs, settings)))
    return readings


def _decode_pictures(
    film: Media, names: list[str], times: np.ndarray, settings: tuple[float, View, DataConfig]
) -> tuple[np.ndarray, FlowPairs]:
    """Return the video's pictures, uint8 [T, 3, S, S], and the frames of the flow pairs, each if asked for."""
    stop_s, view, data = settings
    n_times = len(times)
    ends, forward = pair_ends(times, stop_s, data.flow_step_s)
    video = np.empty(data.input_shape("video"), np.uint8)
    pairs = FlowPairs(film, n_times, data.flow_size)
    for shown in frames_at(film, times, ends if "flow" in names else ()):
        here = [place for place in shown.places if place < n_times]
        if "video" in names and here:
            video[here] = video_picture(to_rgb(film, shown.frame), view, data.size)
        if "flow" in names:
            there = [place - n_times for place in shown.places if place >= n_times]
            firsts = [i for i in here if forward[i]] + [i for i in there if not forward[i]]
            seconds = [i for i in here if not forward[i]] + [i for i in there if forward[i]]
            pairs.take(shown, firsts, seconds)
    return video, pairs


def _flow_pictures(pairs: FlowPairs, settings: tuple[float, View, DataConfig]) -> np.ndarray:
    """Return flow as pictures, uint8 [T, 3, S, S]."""
    _, view, data = settings
    flow = np.empty(data.input_shape("flow"), np.uint8)
    for place, field in enumerate(pairs.fields(data.flow_step_s)):
        flow[place] = flow_picture(field, view, data.size, data.flow_clamp_px)
    return flow


def _read_audio(clip: Clip, film: Media, times: np.ndarray, span: tuple[float, float], data: DataConfig) -> Reading:
    own = clip.sources.get("audio")
    if own is None:
        if film.sound is None:
            return _absent(f"{clip.video} has no sound track")
        return Reading(PRESENT, read_audio(film, times, span, data))
    with Media(own) as recording:
        if recording.sound is None:
            raise MediaError(f"{own}: has no sound track. Leave its cell in the table empty, or name another file.")
        return Reading(PRESENT, read_audio(recording, times, span, data))


def _read_detections(
    clip: Clip, film: Media, times: np.ndarray, span: tuple[float, float], view: View, data: DataConfig
) -> Reading:
    source = clip.sources.get("detections")
    if source is None:
        return _absent("the table has no detections column")
    boxes = read_boxes(source, (clip.video.stem, clip.clip_id))
    if boxes is None:
        return _absent(f"{source} has no boxes of {clip.video.stem}")
    if not has_boxes(boxes, *span):
        return _absent(f"{source} has no box between {span[0]:.3f} and {span[1]:.3f} s")
    return Reading(PRESENT, place_boxes(boxes, times, view, data.max_boxes, lambda: _picture_size(film)))


def _picture_size(film: Media) -> tuple[int, int]:
    """Return width and height of the upright video."""
    if film.pictures is None:
        raise MediaError(f"{film.path}: has no picture to take the size from. State width and height with the boxes.")
    height, width, _ = to_rgb(film, next(frames_at(film, [0.0])).frame).shape
    return width, height
