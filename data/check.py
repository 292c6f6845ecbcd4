"""Checking clips against the files that the table names: bad rows, missing files, frames that cannot be decoded."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from .annotations import Clip, ClipTable
from .clips import BadRow
from .config import DataConfig
from .errors import MediaError
from .modality import FAILED
from .packs import split_pack
from .places import exists, located, matches
from .raw import open_film
from .readers import Order, ReaderPool

# Of the data sets of the field, and of what cameras and phones write.
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "aac", "opus", "vorbis", "mp3", "flac", "pcm_s16le")
SOUND_S = 0.1
AT_A_TIME = 64  # clips whose frames are asked for at once


def check_clips(table: ClipTable, data: DataConfig, count: Callable[[int], None] = lambda n: None) -> list[BadRow]:
    """Open every source of every clip, without decoding, and return a row for each that cannot be what it should be.

    Found are files that are missing or no media, clips that start or stop beyond the end of their video, as its header
    or index states it, and labels that no training clip has.  Numbers count clips from 1, in the table's order.
    """
    bad, untrained = [], _untrained(table)
    # Neighbouring rows share their video: one opening serves them all.
    length = lru_cache(maxsize=256)(_length)
    for row in range(table.n_clips):
        clip = table.clip(row)
        reasons = [reason for name in data.read_modalities if (reason := _source_problem(clip, name, data))]
        reasons += [reason] if (reason := _video_problem(clip, length)) else []
        reasons += untrained.get(row, [])
        bad += [BadRow(table.path, "clip", row + 1, clip.clip_id, reason) for reason in dict.fromkeys(reasons)]
        count(1)
    return bad


def _untrained(table: ClipTable) -> dict[int, list[str]]:
    """Return row -> reasons for val and test clips with a label that no training clip has."""
    out: dict[int, list[str]] = {}
    for head in table.heads:
        labels = np.array([text or "" for text in table.arrow.column(head).to_pylist()])
        trained = labels[table.split == "train"]
        for row in np.flatnonzero((labels != "") & ~np.isin(labels, trained)) if len(trained) else ():
            out.setdefault(int(row), []).append(f"{head} = {str(labels[row])!r}, which no training clip has")
    return out


def _source_problem(clip: Clip, modality: str, data: DataConfig) -> str:
    """Return what is wrong with a source that a modality has of its own, '' for nothing."""
    source = clip.sources.get(modality)
    if source is None:
        return ""
    has_parts = modality == "flow" and data.flow_method == "released"
    for part in map(located, (source / "u", source / "v") if has_parts else (source,)):
        pack = split_pack(part)
        if not exists(pack[0] if pack else part) and not matches(part):
            return f"{modality}: {part}: no such file"
    return ""


def _video_problem(clip: Clip, length: Callable[[Path, float | None], tuple[float, float] | str]) -> str:
    found = length(clip.video, clip.rates.get("video"))
    if isinstance(found, str):
        return found
    end_s, lasts = found
    if clip.start_s >= end_s:
        return f"start_s = {clip.start_s:g}, but {clip.video} ends at {end_s:.3f} s"
    if clip.stop_s is not None and clip.stop_s > end_s + lasts:
        return f"stop_s = {clip.stop_s:g}, but {clip.video} ends at {end_s:.3f} s"
    return ""


def _length(path: Path, fps: float | None) -> tuple[float, float] | str:
    """Return the seconds of a video and of one frame of it, or why it cannot be opened."""
    try:
        with open_film(path, fps) as film:
            return film.stated_s, film.frame_s
    except MediaError as error:
        return str(error)


def unreadable_frames(
    table: ClipTable, rows: np.ndarray, data: DataConfig, n_readers: int, count: Callable[[int], None] = lambda n: None
) -> dict[str, str]:
    """Read the first, the middle and the last frame of some clips; return clip id -> why one of them cannot be.

    rows: of the table.  Read are pictures and boxes at these moments, the video for flow that is computed, and all of
    the sound; by reader processes, so that a codec library that crashes fails its clip alone.  What is absent by
    design is no failure.
    """
    is_computed = data.flow_method != "released"
    wanted = {"video" if m == "flow" and is_computed else m for m in data.read_modalities}
    seen, heard = tuple(sorted(wanted - {"audio"})), tuple(wanted & {"audio"})
    length, failed = lru_cache(maxsize=256)(_length), {}
    with ReaderPool(n_readers, data.model_copy(update={"frames": 2})) as readers:
        for part in np.array_split(rows, -(-len(rows) // AT_A_TIME)) if len(rows) else ():
            orders: list[Order] = []
            for clip in map(table.clip, part.tolist()):
                found = length(clip.video, clip.rates.get("video"))
                spans = [] if isinstance(found, str) else _moments(clip, *found)
                if not spans:
                    failed[clip.clip_id] = _video_problem(clip, length)
                orders += [(span, 0, seen) for span in spans if seen]
                orders += [(clip, 0, heard)] if spans and heard else []
            for (clip, *_), future in zip(orders, readers.submit(orders), strict=True):
                for name, reading in future.result().items():
                    if reading.state == FAILED:
                        failed.setdefault(clip.clip_id, f"{name} from {clip.start_s:.3f} s on: {reading.reason}")
            count(len(part))
    return failed


def _moments(clip: Clip, end_s: float, lasts: float) -> list[Clip]:
    """Return the spans of a clip's first, middle and last frame; none if it starts behind the end of its video."""
    stop_s = min(end_s, clip.stop_s or end_s)
    lasts = lasts or min(SOUND_S, stop_s - clip.start_s)  # a file of sound alone has no frames
    last_s = max(clip.start_s, stop_s - lasts)
    starts = dict.fromkeys((clip.start_s, (clip.start_s + last_s) / 2, last_s))
    return [replace(clip, start_s=start, stop_s=min(start + lasts, stop_s)) for start in starts if start < stop_s]


def missing_codecs() -> list[str]:
    """Return what of the usual codecs FFmpeg, as it is installed here, does not decode."""
    import av

    return [name for name in CODECS if name not in av.codecs_available]
