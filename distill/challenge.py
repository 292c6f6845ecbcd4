"""Predictions in the form that the action recognition challenge of EPIC-KITCHENS-100 takes."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.errors import RunError
from ..data.publish import publish
from ..data.runs import RunFolder
from .predictions import Predictions

HEADS = ("verb", "noun")
# Levels of supervision: pretraining on public images and videos, labels with times, the whole training split.
SUPERVISION = (2, 3, 3)


def require_heads(run: RunFolder) -> None:
    """Raise RunError unless the run's heads are verb and noun."""
    heads = run.config["classes"]
    if set(heads) != {*HEADS}:
        raise RunError(f"{run.path}: the challenge wants the heads verb and noun, this run has {', '.join(heads)}.")


def write_submission(
    path: Path, found: Predictions, clip_ids: np.ndarray, supervision: Sequence[int] = SUPERVISION
) -> None:
    """Write scores of every predicted clip, all its modalities in: a .json file, or a .zip that holds it as test.json.

    clip_ids: [N] of the table; they are the narration ids.  supervision: sls_pt, sls_tl and sls_td, 0..5 each.
    Source: EPIC-KITCHENS-100, format 0.2.
    """
    logits = found.logits[max(found.logits, key=len)]
    results = {
        str(clip_ids[row]): {head: _by_class(logits[head][at].tolist()) for head in HEADS}
        for at, row in enumerate(found.rows)
    }
    levels = dict(zip(("sls_pt", "sls_tl", "sls_td"), supervision, strict=True))
    text = json.dumps({"version": "0.2", "challenge": "action_recognition", **levels, "results": results})
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
