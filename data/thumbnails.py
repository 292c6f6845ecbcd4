"""Pictures for people: the middle frame of a clip as a small JPEG, and arrays as PNG."""

from collections.abc import Sequence

import numpy as np

from .annotations import Clip
from .config import DataConfig
from .readers import ReaderPool

SIDE, QUALITY = 160, 80


def thumbnails(clips: Sequence[Clip], data: DataConfig, side: int = SIDE) -> list[bytes | None]:
    """Return a JPEG picture of each clip, `side` pixels square; None for a clip without video, or one that fails."""
    seen = data.model_copy(update={"size": side, "frames": 3, "center_crop": 1.0})
    with ReaderPool(1, seen) as readers:
        futures = readers.submit([(clip, 0, ("video",)) for clip in clips])
        return [_jpeg(future.result()["video"].array) for future in futures]


def _jpeg(frames: np.ndarray | None) -> bytes | None:
    """Encode the middle one of frames, uint8 [T, 3, H, W] RGB."""
    if frames is None:
        return None
    import cv2

    picture = cv2.cvtColor(frames[len(frames) // 2].transpose(1, 2, 0), cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return encoded.tobytes()


def png(picture: np.ndarray) -> bytes:
    """Encode a picture, uint8 [H, W, 3] RGB or [H, W] grey, without loss."""
    import cv2

    _, encoded = cv2.imencode(".png", picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return encoded.tobytes()
