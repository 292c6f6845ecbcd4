"""Pictures: video and computed flow of neighbouring clips, decoded in one pass over their film."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .config import DataConfig
from .errors import MediaError
from .flow import FlowPairs, flow_picture, pair_ends
from .media import Reading
from .modality import FAILED, PRESENT
from .video import Converter, Film, Shown, frames_at, video_picture
from .views import View


@dataclass(frozen=True)
class Asked:
    """What is wanted of a film for one clip: 'video', 'flow' or both, at times [T] in seconds, ascending."""

    names: tuple[str, ...]
    times: np.ndarray
    stop_s: float
    view: View


def read_pictures(film: Film, asked: Sequence[Asked], data: DataConfig) -> list[dict[str, Reading]]:
    """Return for each clip name -> Reading; every result is what the clip alone, and the name alone, would give.

    Neighbouring and overlapping clips share one pass, in which no frame is decoded twice.
    """
    out: dict[int, dict[str, Reading]] = {}
    for together in _passes(film, asked):
        out |= dict(zip(together, _read_pass(film, [asked[at] for at in together], data), strict=True))
    return [out[at] for at in range(len(asked))]


def _passes(film: Film, asked: Sequence[Asked]) -> Iterator[list[int]]:
    """Cut the clips, in order of time, where going on from the next key frame is cheaper than decoding on."""
    order = sorted(range(len(asked)), key=lambda at: float(asked[at].times[0]))
    together, reach_s = order[:1], float(asked[order[0]].times[-1])
    for at in order[1:]:
        start_s, end_s = float(asked[at].times[0]), float(asked[at].times[-1])
        if start_s > reach_s and film.worth_seeking(reach_s, start_s):
            yield together
            together = []
        together.append(at)
        reach_s = max(reach_s, end_s)
    yield together


def _read_pass(film: Film, asked: list[Asked], data: DataConfig) -> list[dict[str, Reading]]:
    """Read clips in one pass; if anything in it fails, each clip and each name by itself, so that only it fails."""
    try:
        return _decoded(film, asked, data)
    except MediaError as error:
        if len(asked) > 1:
            return [found for one in asked for found in _read_pass(film, [one], data)]
        (one,) = asked
        if len(one.names) == 1:
            return [{one.names[0]: Reading(FAILED, None, str(error))}]
        alone = [_read_pass(film, [replace(one, names=(name,))], data)[0] for name in one.names]
        return [{name: reading for found in alone for name, reading in found.items()}]


def _decoded(film: Film, asked: list[Asked], data: DataConfig) -> list[dict[str, Reading]]:
    drafts = [_Draft(film, one, data) for one in asked]
    # Places count through the times of all clips, then through the far ends of the flow pairs of all clips.
    owners = [(draft, step, is_end) for is_end in (False, True) for draft in drafts for step in draft.steps(is_end)]
    times = np.concatenate([one.times for one in asked])
    ends = np.concatenate([draft.ends for draft in drafts])
    converter = Converter()
    for shown in frames_at(film, times, ends):
        mine: dict[_Draft, list[tuple[int, bool]]] = {}
        for place in shown.places:
            draft, step, is_end = owners[place]
            mine.setdefault(draft, []).append((step, is_end))
        for draft, steps in mine.items():
            draft.take(shown, steps, converter)
    return [draft.readings() for draft in drafts]


class _Draft:
    """The pictures of one clip, taken frame by frame."""

    def __init__(self, film: Film, asked: Asked, data: DataConfig) -> None:
        self.asked, self.data = asked, data
        n_times = len(asked.times)
        self.video = np.empty(data.input_shape("video"), np.uint8) if "video" in asked.names else None
        self.pairs = FlowPairs(film, n_times, data) if "flow" in asked.names else None
        ends, self.forward = pair_ends(asked.times, asked.stop_s, data.flow_step_s)
        self.ends = ends if self.pairs else ends[:0]

    def steps(self, is_end: bool) -> range:
        """Return the time steps that wait for a frame, or for the far end of their flow pair."""
        return range(len(self.ends) if is_end else len(self.asked.times))

    def take(self, shown: Shown, mine: list[tuple[int, bool]], converter: Converter) -> None:
        """Take a frame that is on display at these (step, is far end)."""
        here = [step for step, is_end in mine if not is_end]
        if self.video is not None and here:
            self.video[here] = video_picture(converter.rgb(shown.frame), self.asked.view, self.data.size)
        if self.pairs is not None:
            first = [step for step, is_end in mine if is_end != self.forward[step]]
            second = [step for step, is_end in mine if is_end == self.forward[step]]
            self.pairs.take(shown, first, second)

    def readings(self) -> dict[str, Reading]:
        """Return what was asked for; raises MediaError if there is no flow between the frames."""
        out = {}
        if self.video is not None:
            out["video"] = Reading(PRESENT, self.video)
        if self.pairs is not None:
            flow = np.empty(self.data.input_shape("flow"), np.uint8)
            for step, field in enumerate(self.pairs.fields()):
                flow[step] = flow_picture(field, self.asked.view, self.data.size, self.data.flow_clamp_px)
            out["flow"] = Reading(PRESENT, flow)
        return {name: out[name] for name in self.asked.names}
