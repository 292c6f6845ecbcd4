"""Made-up raw arrays of every modality, in its dtype and range: for checks where no clip is at hand."""

from collections.abc import Callable

import numpy as np

from .audio import FLOOR


def noise(modality: str, shape: tuple[int, ...], n: int, seed: int = 0) -> np.ndarray:
    """Return n clips [n, *shape] that show nothing; shape: as in `DataConfig.input_shape`."""
    return MADE[modality](np.random.default_rng(seed), (n, *shape))


def _pixels(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return draw.integers(0, 256, shape, dtype=np.uint8)


def _sound(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return draw.uniform(np.log10(FLOOR), 3.0, shape).astype(np.float32)  # log10 of power


def _boxes(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    corners = np.sort(draw.random((*shape[:-1], 2, 2)), axis=-2).reshape(*shape[:-1], 4)  # x1, y1, x2, y2
    rows = [corners, draw.random((*shape[:-1], 1)), draw.integers(0, 3, (*shape[:-1], 1))]
    return np.concatenate(rows, axis=-1).astype(np.float32)  # score; category 0 no box, 1 hand, 2 object


MADE: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "video": _pixels,
    "flow": _pixels,
    "audio": _sound,
    "detections": _boxes,
}
