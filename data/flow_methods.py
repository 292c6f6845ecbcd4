"""Methods of optical flow: OpenCV's DIS and Farneback, and torchvision's RAFT where its weights are given."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .config import DataConfig
from .errors import ConfigError
from .tensors import read_tensors

# RAFT works at an eighth of the resolution, four levels deep.
RAFT_MULTIPLE, RAFT_SMALLEST = 8, 128


@dataclass(frozen=True)
class FlowMethod:
    """How the flow of a pair is computed: from frames uint8, grey [H, W] or rgb [H, W, 3], to float32 [H, W, 2].

    Flow is in pixels to the right and down from the first frame to the second.
    """

    form: Literal["grey", "rgb"]
    compute: Callable[[np.ndarray, np.ndarray], np.ndarray]


def flow_method(data: DataConfig) -> FlowMethod:
    """Return the method that the settings name; raises ConfigError if RAFT's weights cannot be loaded."""
    if data.flow_method == "farneback":
        return FlowMethod("grey", _farneback)
    if data.flow_weights is not None and data.flow_method.startswith("raft"):
        return _raft(data.flow_method, data.flow_weights)
    return FlowMethod("grey", _dis)


def flow_identity(data: DataConfig) -> dict[str, Any]:
    """Return what a cache's identity must know of the method beyond the settings: the content of RAFT's weights."""
    if data.flow_weights is None or not data.flow_method.startswith("raft"):
        return {}
    return {"flow_weights": _content_digest(data.flow_weights), "flow_from": f"torchvision {version('torchvision')}"}


def _content_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"flow_weights {path}: {error.strerror}. Name a file of RAFT's weights.") from None


def _dis(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Preset MEDIUM: FAST, five times faster, sees 0.6, 1.4 and 3.7 of motions of 1, 2 and 4 px (0.9, 2.0, 4.0)."""
    import cv2

    cv2.setNumThreads(1)  # the field must not depend on the number of threads
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return method.calc(one, two, None)  # type: ignore[call-overload]  # its stubs lack None: OpenCV makes the array


def _farneback(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """OpenCV's own example values: 3 levels by halves, windows of 15, 3 iterations, neighbourhoods of 5 (sigma 1.2)."""
    import cv2

    cv2.setNumThreads(1)
    settings = (0.5, 3, 15, 3, 5, 1.2, 0)
    return cv2.calcOpticalFlowFarneback(one, two, None, *settings)  # type: ignore[call-overload]  # as above


@lru_cache(maxsize=1)
def _raft(name: str, weights: Path) -> FlowMethod:
    import torch
    from torch.nn.functional import pad

    from .device import choose_device

    device = choose_device("auto")
    model = _loaded(name, weights).to(device)

    @torch.inference_mode()
    def compute(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        height, width = one.shape[:2]
        # Repeating the border moves nothing; [left, right, top, bottom]
        room = [0, _room(width), 0, _room(height)]
        pair = torch.from_numpy(np.stack([one, two])).to(device).permute(0, 3, 1, 2)  # [2, 3, H, W]
        first, second = pad(pair / 127.5 - 1, room, mode="replicate").split(1)
        flow = model(first, second)[-1][0, :, :height, :width]  # [2, H, W]
        return flow.permute(1, 2, 0).float().cpu().numpy()

    return FlowMethod("rgb", compute)


def _room(side: int) -> int:
    """Return how many pixels a side lacks to what RAFT takes."""
    return max(RAFT_SMALLEST, -(-side // RAFT_MULTIPLE) * RAFT_MULTIPLE) - side


def _loaded(name: str, weights: Path) -> Any:
    """Return RAFT in evaluation mode; raises ConfigError for a file that is missing or holds something else."""
    from torchvision.models import optical_flow

    model = getattr(optical_flow, name)(weights=None, progress=False)
    try:
        model.load_state_dict(read_tensors(weights))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"{weights}: not the weights of {name}: {first}. Name its file in flow_weights.") from None
    return model.eval().requires_grad_(False)
