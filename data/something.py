"""Something-Something V2: the official label files in the columns of one's own tables."""

import json
from pathlib import Path
from typing import Any

from .errors import TableError, nearest
from .tables import TextTable

# Where the official archives put the videos, beside the labels.
VIDEOS = "20bn-something-something-v2/{video_id}.webm"
FPS = "12"
HEAD = "action"


def read_something(path: Path, labels: Path | None, heads: tuple[str, ...]) -> tuple[TextTable, dict[str, Any]]:
    """Return the clips of train.json, validation.json or test.json, and what the data set fixes.

    labels: labels.json, template -> index; by default the one beside the table.  An entry without a template is
    unlabelled.  An entry that repeats another in every word counts once.
    Raises TableError if a file is missing or of another form, or for heads other than 'action'.
    """
    if heads != (HEAD,):
        raise TableError(f'{path}: Something-Something has one head. Set heads = ["{HEAD}"], found {list(heads)}.')
    classes = _classes(_labels_file(path, labels))
    entries = _entries(path)
    bad: dict[int, str] = {}
    seen: dict[str, Any] = {}
    ids, found, lines = [], [], []
    for line, entry in enumerate(entries, 1):
        clip_id = str(entry.get("id", "")) if isinstance(entry, dict) else ""
        if not clip_id:
            bad[line] = f"expected an object with an id, found {str(entry)[:60]}"
        elif seen.setdefault(clip_id, entry) is entry or seen[clip_id] != entry:  # else a plain repetition
            template = str(entry.get("template", "")).replace("[", "").replace("]", "")
            if template and template not in classes:
                bad[line] = f"unknown template {entry['template']!r}. {nearest(template, classes)}"
            ids.append(clip_id)
            found.append(template if template in classes else "")
            lines.append(line)
    fps = [FPS] * len(ids)
    columns = {"clip_id": ids, "video_id": list(ids), "video_fps": fps, HEAD: found}
    return TextTable([*columns], columns, lines, "entry", bad), {"video_files": VIDEOS, "class_names": {HEAD: classes}}


def _labels_file(path: Path, labels: Path | None) -> Path:
    """Return the file of classes: the one named, or one beside the table."""
    if labels is not None:
        return labels
    swapped = [path.name.replace(split, "labels") for split in ("train", "validation", "test") if split in path.name]
    for name in ("labels.json", *swapped):
        if (path.parent / name).exists():
            return path.parent / name
    raise TableError(f"{path}: no labels.json beside it. Put it there, or set labels.")


def _classes(path: Path) -> tuple[str, ...]:
    """Return the classes in the order of their indices."""
    content = _parsed(path)
    if not isinstance(content, dict) or not content:
        raise TableError(f"{path}: expected an object of template -> index. Fetch the file again.")
    by_index = {str(index): template.replace("[", "").replace("]", "") for template, index in content.items()}
    order = [str(index) for index in range(len(content))]
    if sorted(by_index) != sorted(order):
        raise TableError(f"{path}: expected each index from 0 to {len(content) - 1} once. Fetch the file again.")
    return tuple(by_index[index] for index in order)


def _entries(path: Path) -> list[Any]:
    content = _parsed(path)
    if not isinstance(content, list):
        raise TableError(f"{path}: expected a list of clips, found {type(content).__name__}. Name train.json.")
    return content


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TableError(f"{path}: no such file. Name one in [data].") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(f"{path}: cannot be read as JSON: {error}. Fetch it again.") from None
