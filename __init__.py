"""KARMMA: action recognition that keeps working when a modality is missing.

`data <- extract, fuse <- distill <- cli`: a file imports from its own room or from rooms to its left.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .distill.predictor import Predictor

__version__ = "0.1.0"


def load(
    run: str | os.PathLike[str], device: str = "auto", flow_weights: str | os.PathLike[str] | None = None
) -> "Predictor":
    """Return what predicts raw files with a finished student: `karmma.load("runs/student-...").predict("clip.mp4")`.

    See `karmma.distill.predictor`: device, flow_weights, and the errors raised.
    """
    from .distill.predictor import load  # torch and all: nobody waits for them who only wants the version

    return load(run, device, flow_weights)
