"""Predictions in the form that the action recognition challenge of EPIC-KITCHENS-100 takes."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.errors import ConfigError, RunError
from ..data.publish import publish
from ..data.runs import RunFolder
from .subsets import Predictions

HEADS = {"verb": 97, "noun": 300}  # classes, in the official order
SUFFIXES = (".json", ".zip")
# Levels of supervision: pretraining on public images and videos, labels with times, the whole training split.
SUPERVISION = (2, 3, 3)


def require_submittable(run: RunFolder, path: Path) -> None:
    """Raise RunError unless the run has the challenge's heads and classes, ConfigError for another kind of file.

    That the classes stand in the official order is a matter of the official table, which the run was trained from.
    """
    heads = {head: len(names) for head, names in run.config["classes"].items()}
    if heads != HEADS:
        said, wanted = (", ".join(f"{head} {n}" for head, n in each.items()) for each in (heads, HEADS))
        raise RunError(f"{run.path}: its heads and classes are {said}, the challenge wants {wanted}. Name another run.")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: a submission ends in .json or .zip. Choose another name.")


def write_submission(
    path: Path, found: Predictions, clip_ids: np.ndarray, supervision: Sequence[int] = SUPERVISION
) -> None:
    """Write scores of every predicted clip, all its modalities in: a .json file, or a .zip that holds it as test.json.

    clip_ids: [N] of the table; they are the narration ids.  supervision: sls_pt, sls_tl and sls_td, 0..5 each.
    Source: EPIC-KITCHENS-100, format 0.2.
    """
    logits = found.logits[found.modalities]
    results = {
        str(clip_ids[row]): {head: _by_class(logits[head][at].tolist()) for head in HEADS}
        for at, row in enumerate(found.rows)
    }
    levels = dict(zip(("sls_pt", "sls_tl", "sls_td"), supervision, strict=True))
    said = {"version": "0.2", "challenge": "action_recognition", **levels, "results": results}
    text = json.dumps(said, allow_nan=False)
    if path.suffix.lower() != ".zip":
        publish(path, text.encode())
        return
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        # A fixed date, so that the same predictions give the same file.
        file.writestr(zipfile.ZipInfo("test.json", (1980, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
    publish(path, packed.getvalue())


def _by_class(scores: Sequence[float]) -> dict[str, float]:
    return {str(index): score for index, score in enumerate(scores)}
