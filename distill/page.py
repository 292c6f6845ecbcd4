"""The parts of the page on which a student is tried, as HTML: what it says, and what it is given."""

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib.resources import files
from math import prod
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from ..data.config import DataConfig
from ..data.media import Reading
from ..fuse.metrics import ACTION
from . import viewing
from .prediction import Prediction

TOP = 5
SMALL = 112  # pixels a side: below it a picture is shown larger than it is, and its pixels as squares
CHANNELS = ("u: right is bright, left is dark", "v: down is bright, up is dark", "speed: fast is bright")


@cache
def _macros() -> Any:
    pages = Environment(loader=PackageLoader("karmma.distill", "."), autoescape=select_autoescape(), trim_blocks=True)
    return pages.get_template("page.html").module


def style() -> str:
    """Return the style sheet of the parts."""
    return (files(__package__) / "page.css").read_text()


def head(title: str, modalities: Sequence[str], classes: Mapping[str, Sequence[str]]) -> str:
    """Return the head of the page: which student this is."""
    return _macros().head(title, modalities, {name: len(names) for name, names in classes.items()})


def hint(text: str) -> str:
    """Return a line that says what to do."""
    return _macros().note(text, "hint")


def aside(text: str) -> str:
    """Return a line in small print."""
    return _macros().note(text, "aside")


def error(text: str) -> str:
    """Return a line that says what is wrong."""
    return _macros().note(text, "error")


def answer(said: Prediction, whole: Prediction) -> str:
    """Return the likeliest classes by head, and actions, as bars.

    whole: what is said from all that the clip has, marked in the bars where it is something else.
    """
    sure = {head: dict(whole.top(head, len(whole[head]))) for head in whole}
    cards = [
        {"head": head, "rows": [{"name": n, "prob": p, "whole": sure[head][n]} for n, p in said.top(head, TOP)]}
        for head in said
    ]
    actions = [
        {"name": " + ".join(names), "prob": p, "whole": prod(sure[h][n] for h, n in zip(said, names, strict=True))}
        for names, p in said.actions(TOP)
    ]
    if actions:
        cards.insert(0, {"head": ACTION, "rows": actions})
    return _macros().answer(said.present, cards, said.present == whole.present)


class Shown:
    """What a student is given of one clip, as HTML by modality.

    readings: those of the clip.  times: [T], the moments in seconds.
    """

    def __init__(self, readings: Mapping[str, Reading], times: np.ndarray, data: DataConfig) -> None:
        self.arrays = {name: each.array for name, each in readings.items() if each.array is not None}
        self.times, self.data, self.is_small = times.tolist(), data, data.size < SMALL

    def html(self, modality: str) -> str:
        """Return what is shown of a modality; '' if the clip lacks it."""
        return getattr(self, f"_{modality}")(self.arrays[modality]) if modality in self.arrays else ""

    @cached_property
    def _frames(self) -> list[str]:
        return [viewing.address(frame) for frame in viewing.frames(self.arrays["video"])]

    def _video(self, array: np.ndarray) -> str:
        said = f"{len(array)} frames of {_size(array)} pixels"
        return _macros().video(said, self._frames, self.times, self.is_small)

    def _flow(self, array: np.ndarray) -> str:
        full = viewing.fast(array)
        pictures = [viewing.address(picture) for picture in viewing.flow_colours(array, full)]
        channels = [([viewing.address(one) for one in array[:, at]], what) for at, what in enumerate(CHANNELS)]
        data, method = self.data, self.data.flow_method
        speed = f"{full:.0f} of 127 levels"
        if method != "released":
            speed = f"{full * data.flow_clamp_px / 127:.1f} pixels in {data.flow_step_s:g} s"
        said = f"{len(array)} fields of {_size(array)}, {'released' if method == 'released' else f'by {method}'}"
        wheel = viewing.address(viewing.flow_wheel())
        return _macros().flow(said, pictures, channels, self.times, self.is_small, wheel, speed)

    def _audio(self, array: np.ndarray) -> str:
        heard = viewing.sound(array, np.array(self.times), self.data)
        step_s = viewing.step_s(heard)
        stretches = [
            {
                "picture": viewing.address(one.picture),
                "steps": one.picture.shape[1],
                "span": f"{one.start_s:.2f} to {one.stop_s:.2f} s",
                "ticks": one.ticks(step_s),
            }
            for one in heard
        ]
        said = f"{len(array)} spectrograms of {array.shape[1]} mels x {array.shape[2]} steps, "
        said += f"{self.data.audio_segment_s:g} s around each moment"
        span = [f"{power:.1f}" for power in viewing.loudness(array)]
        return _macros().audio(said, stretches, viewing.tones(self.data), *span)

    def _detections(self, array: np.ndarray) -> str:
        moments = viewing.boxes(array)
        said = f"{sum(map(len, moments))} boxes at {len(moments)} moments"
        behind = self._frames if "video" in self.arrays else []
        return _macros().detections(said, moments, self.times, behind)


def _size(array: np.ndarray) -> str:
    return f"{array.shape[-1]} x {array.shape[-2]}"
