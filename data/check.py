"""Checking a clip table against the files it names: every bad row with its reason, before any long work begins."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from .annotations import Clip, ClipTable
from .clips import BadRow
from .config import DataConfig
from .errors import MediaError
from .packs import split_pack
from .places import exists, located, matches
from .raw import open_film


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
        reasons = [reason for name in data.modalities if (reason := _source_problem(clip, name, data))]
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
