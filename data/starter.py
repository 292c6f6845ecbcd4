"""A settings file to start from: for the data sets of the field, or for a folder of one's own, every line explained."""

import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .annotations import SPLITS
from .clips import COLUMNS
from .config import DataConfig, Place, StageConfig
from .errors import ConfigError, MediaError, nearest
from .footage import HEARD, find_footage
from .media import Media
from .settings import read_preset, resolve
from .tables import read_text_table

TABLES = ("clips.csv", "clips.parquet")
SPLIT_FOLDERS = {name: name for name in SPLITS} | {"training": "train", "validation": "val", "valid": "val"}
# Of ten clips of a label, which go to val and test: few clips of a label have one there too.
VAL, TEST, OF = 1, 3, 10
LOOKED_AT = 3  # films whose tracks are looked at
FPS = 30.0
WRITE = "Or write clips.csv there: docs/clips.md says how."


@dataclass(frozen=True)
class Starter:
    """What a settings file begins with.

    chosen: fields of [data] -> value, and why it is there.  clips: rows of a table that has yet to be written, a
    header first.
    """

    title: str
    preset: str
    chosen: Mapping[str, tuple[Any, str]]
    clips: tuple[tuple[str, ...], ...] = ()


def epic(annotations: Path, media: Place) -> Starter:
    """Return what EPIC-KITCHENS-100 needs: folders of the official annotations and of the official download."""
    return Starter(
        "EPIC-KITCHENS-100",
        "paper",
        {
            "table": (annotations / "EPIC_100_train.csv", "official annotations, as they are"),
            "val_table": (annotations / "EPIC_100_validation.csv", "24 clips of 4 nouns are left out: see prune"),
            "media": (media, "the folder that the official download fills"),
            "video_files": ("{participant}/videos/{video_id}.MP4", "or {participant}/rgb_frames/{video_id}"),
            "flow_files": ("{participant}/flow_frames/{video_id}", "folders of u/ and v/; leave out to compute flow"),
            "flow_method": ("released", "or dis, which computes it from the video"),
            "heads": (["verb", "noun"], "one classifier each; an action is both"),
            "modalities": (["video", "flow", "audio"], "those of the paper"),
        },
    )


def ssv2(annotations: Path, media: Place) -> Starter:
    """Return what Something-Something V2 needs: folders of the official label files and of the videos."""
    return Starter(
        "Something-Something V2",
        "paper",
        {
            "table": (annotations / "train.json", "official labels, as they are; labels.json lies beside them"),
            "val_table": (annotations / "validation.json", "the split that the paper reports"),
            "media": (media, "holds 20bn-something-something-v2/ and the boxes"),
            "detections_files": ("boxes/bounding_box_smthsmth_part*.json", "Something-Else's boxes"),
            "heads": (["action"], "one classifier each"),
            "modalities": (["video", "flow", "detections"], "those of the paper"),
        },
    )


def own(folder: Path) -> Starter:
    """Return what a folder of one's own needs: from its clip table, or if there is none, from the films below it.

    A film's label is the folders that it lies in, but for those that all share.  If each film lies in one folder called
    train, val or test, that is its split; else every tenth clip of a label goes to val and to test.
    Raises ConfigError if there is neither a table nor films in folders, or if a table could not hold their names.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Name epic, ssv2, or a folder of clips.")
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is not None:
        return _of_table(folder, table)
    try:
        films = [film for film in find_footage(folder) if film.suffix.lower() not in HEARD]
    except MediaError as error:
        raise ConfigError(f"{error} {WRITE}") from None
    if not films:
        raise ConfigError(f"{folder}: holds sound alone. {WRITE}")
    for film in films:
        name = film.relative_to(folder).as_posix()
        if not name.isprintable() or any(part != part.strip() for part in name.split("/")):
            raise ConfigError(f"{folder}: a table cannot hold the name {name!r}. Rename it.")
    rows = list(_rows(folder, films))
    if not any(label for *_, label in rows):
        raise ConfigError(f"{folder}: its films lie in no folders that could be their labels. {WRITE}")
    return _starter(folder / TABLES[0], ["label"], films, clips=[("clip_id", "video", "split", "label"), *rows])


def _rows(folder: Path, films: list[Path]) -> Iterator[tuple[str, ...]]:
    """Yield id, film, split and label of each clip."""
    above = [film.relative_to(folder).parts[:-1] for film in films]
    splits = [[part for part in parts if part.lower() in SPLIT_FOLDERS] for parts in above]
    is_split = all(len(found) == 1 for found in splits)  # else such a name is that of a class
    labels = [tuple(part for part in parts if not is_split or part.lower() not in SPLIT_FOLDERS) for parts in above]
    n_shared = 0
    while len({*labels}) > 1 and len({parts[: n_shared + 1] for parts in labels}) == 1:
        n_shared += 1
    n_seen: dict[str, int] = defaultdict(int)
    for film, parts, found in zip(films, labels, splits, strict=True):
        name, label = film.relative_to(folder).as_posix(), "/".join(parts[n_shared:])
        at, n_seen[label] = n_seen[label] % OF, n_seen[label] + 1
        drawn = {VAL: "val", TEST: "test"}.get(at, "train")
        yield name, name, SPLIT_FOLDERS[found[0].lower()] if is_split else drawn, label


def _of_table(folder: Path, table: Path) -> Starter:
    """Return what a table asks for: its label columns, and modalities that have a column or a sound track.

    Label columns are those that are no known column, have a value in several rows, and no number with a point.
    """
    text = read_text_table(table, COLUMNS)
    for name in ("clip_id", "video"):
        if name not in text.header and not (name == "video" and "video_id" in text.header):
            raise ConfigError(
                f"{table}: no column {name!r}. {nearest(name, text.header)} A comma stands between columns."
            )
    others = read_text_table(table, [name for name in text.header if name not in COLUMNS]).columns
    heads = [name for name, cells in others.items() if _are_labels(cells)]
    if not heads:
        raise ConfigError(f"{table}: no label column among {', '.join(text.header)}. Add one, such as action.")
    DataConfig(heads=tuple(heads))
    films = [folder / name for name in text.columns.get("video", [])[:LOOKED_AT]]
    return _starter(table, heads, films, "detections" in text.header, "audio" in text.header)


def _are_labels(cells: list[str]) -> bool:
    given = [cell for cell in cells if cell]
    return len({*given}) < max(len(given), 3) and not all(re.fullmatch(r"-?\d*\.\d+", cell) for cell in given)


def _starter(
    table: Path,
    heads: list[str],
    films: list[Path],
    has_boxes: bool = False,
    has_sound: bool = False,
    clips: Iterable[tuple[str, ...]] = (),
) -> Starter:
    """Return the settings of one's own clips; films: some of them, whose sound tracks are looked at."""
    has_sound = has_sound or any(map(_has_sound, films[:LOOKED_AT]))
    modalities = ["video", "flow", *(["audio"] if has_sound else []), *(["detections"] if has_boxes else [])]
    chosen: dict[str, tuple[Any, str]] = {
        "table": (table, "one row a clip: docs/clips.md has every column"),
        "heads": (heads, "label columns, one classifier each"),
        "modalities": (modalities, "flow is computed from the video"),
    }
    if any(film.is_dir() for film in films):
        chosen["video_fps"] = (FPS, "of numbered pictures, which do not say it: CORRECT IT")
    return Starter("Your own clips", "tiny", chosen, tuple(clips))


def _has_sound(film: Path) -> bool:
    try:
        with Media(film) as media:
            return media.has_sound
    except MediaError:  # numbered pictures; what cannot be read, karmma doctor names
        return False


def table_text(starter: Starter) -> str:
    """Return the clip table of a starter as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(starter.clips)
    return text.getvalue()


def settings_text(starter: Starter, preset: str, models: Mapping[str, type[StageConfig]], beside: Path) -> str:
    """Return a settings file: what the starter chose, and behind # every other setting with its value.

    models: section -> its model.  beside: folder of the file, which its paths start from.
    """
    rest = resolve(models, (f"preset {preset}", read_preset(preset)))
    lines = [
        f"# {starter.title}: the settings of every command.  Paths start from the folder of this file; an option",
        "# wins over it.  Lines that begin with # show what holds without them, and where that comes from.",
        "",
        f"preset = {_toml(preset)}  # paper: every value of the paper, for CUDA; tiny: minutes on two CPU cores",
    ]
    for section, config in rest.items():
        chosen = starter.chosen if section == "data" else {}
        lines += ["", f"[{section}]"]
        lines += [f"{name} = {_toml(_beside(value, beside))}  # {why}" for name, (value, why) in chosen.items()]
        for name, info in type(config).model_fields.items():
            if name not in chosen:
                lines += [f"# {name} = {_toml(getattr(config, name))}  # {info.description}; {_source(info)}"]
    return "\n".join(lines) + "\n"


def _source(info: Any) -> str:
    return info.json_schema_extra["source"]


def _beside(value: Any, folder: Path) -> Any:
    is_relative = isinstance(value, Path) and not value.is_absolute()
    return os.path.relpath(value.resolve(), folder) if is_relative else value


def _toml(value: Any) -> str:
    """Return a value as TOML has it, on one line; dots for what is not set."""
    if isinstance(value, StageConfig):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items() if each is not None) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if value is None:
        return "..."
    text = json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # the one letter that TOML does not take as it is
