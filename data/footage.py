"""Footage: files without a clip table, found by name or below a folder, as clips to predict."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .annotations import SOURCES, Clip
from .config import DataConfig
from .errors import ConfigError, MediaError, nearest
from .numbered import PICTURE
from .packs import split_pack
from .places import exists, is_folder, is_local, names, place
from .raw import open_film

PICTURED = frozenset(
    ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv .y4m".split()
)
HEARD = frozenset(".aac .aif .aiff .flac .m4a .mka .mp3 .oga .ogg .opus .wav .wma".split())
RATED = {"video": "video_fps", "flow": "flow_fps", "audio": "audio_hz"}


def find_footage(where: str | os.PathLike[str]) -> list[Path]:
    """Return the films that a name stands for: itself, or all that lie in or below a folder, sorted.

    In a folder: media files by their suffix, and folders of numbered pictures; hidden files are left out.  A folder of
    numbered pictures is one film.  Raises MediaError if there is nothing of that name, or no film in the folder.
    """
    path = place(where)
    file, _ = split_pack(path) or (path, "")
    if not exists(file):
        raise MediaError(f"{file}: no such file or folder. Correct the name.")
    if not is_folder(path):
        return [path]
    found = list(_below(path))
    if not found:
        raise MediaError(f"{path}: holds no media file and no numbered pictures. Name a file, or another folder.")
    return found


def _below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the films of a folder, those beside each other in the order of their names; above: folders around it."""
    if is_local(folder):
        own = os.path.realpath(folder)
        if own in above:  # a link that leads back
            return
        above = (*above, own)
    inside = [name for name in names(folder) if not name.startswith(".")]
    known = {name for name in inside if Path(name).suffix.lower() in PICTURED | HEARD}
    if not known and any(map(PICTURE.fullmatch, inside)):
        yield folder
        return
    for name in inside:
        if is_folder(folder / name):
            yield from _below(folder / name, above)
        elif name in known:
            yield folder / name


def footage_clip(
    path: str | os.PathLike[str],
    data: DataConfig,
    span: tuple[float, float | None] = (0.0, None),
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    rates: Mapping[str, float] | None = None,
) -> Clip:
    """Return a stretch of a film as a clip.

    span: start and stop in seconds, None for the end.  files: modality -> a source of its own; sound is else that of
    the film, flow is computed unless the student saw released flow, and boxes are absent.  rates: modality -> numbered
    frames, or samples, a second, by default those of `data`.  Raises ConfigError on a modality that has no such thing
    or a span that is none, MediaError on a file that is not there.
    """
    for name in {*(files or {})} - {*SOURCES}:
        raise ConfigError(f"{name}: no file of its own is read for that. {nearest(name, SOURCES)}")
    for name in {*(rates or {})} - {*RATED}:
        raise ConfigError(f"{name}: has no rate. {nearest(name, RATED)}")
    start_s, stop_s = span
    if not 0 <= start_s < (float("inf") if stop_s is None else stop_s):
        raise ConfigError(f"{path}: from {start_s} to {stop_s} s: expected a start from 0 on, and a later stop.")
    usual = {"detections": None} | ({"flow": None} if data.flow_method == "released" else {})
    sources: dict[str, Path | None] = usual | {name: place(where) for name, where in (files or {}).items()}
    film = place(path)
    for one in (film, *filter(None, sources.values())):
        file, _ = split_pack(one) or (one, "")
        if "*" not in str(file) and not exists(file):
            raise MediaError(f"{file}: no such file or folder. Correct the name.")
    stated = {name: getattr(data, field) for name, field in RATED.items()} | dict(rates or {})
    known = {name: rate for name, rate in stated.items() if rate}
    return Clip(str(path), film, float(start_s), stop_s, sources, film.stem, known)


def film_and_files(paths: Sequence[Path]) -> tuple[Path, dict[str, Path]]:
    """Return which of files that belong together is the film, and which modality the others are a source of.

    Boxes are a .json; a sound file is the sound of the film beside it, or the film itself where there is no other.
    Raises MediaError if there is no film, or more than one file of a kind.
    """
    boxes = [path for path in paths if path.suffix.lower() == ".json"]
    sounds = [path for path in paths if path.suffix.lower() in HEARD]
    films = [path for path in paths if path not in (*boxes, *sounds)]
    if not films:
        films, sounds = sounds, []
    for kind, found in (("clips", films), ("sound files", sounds), ("files of boxes", boxes)):
        if len(found) > 1:
            named = ", ".join(path.name for path in found)
            raise MediaError(f"{len(found)} {kind}, expected one: {named}. Leave only one of them.")
    if not films:
        raise MediaError(f"{boxes[0].name if boxes else 'nothing'}: no clip is among the files. Add one.")
    files = {"audio": sounds, "detections": boxes}
    return films[0], {name: found[0] for name, found in files.items() if found}


def length_s(clip: Clip) -> float:
    """Return the seconds of a clip's whole film; raises MediaError if it cannot be read."""
    with open_film(clip.video, clip.rates.get("video")) as film:
        return film.duration_s
