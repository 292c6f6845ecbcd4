"""The timeline of a long film: its windows, and what is said of them as CSV rows and as captions."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ..data.captioned import Caption
from ..data.errors import ConfigError
from ..data.media import EPSILON_S
from ..data.modality import letters
from ..data.publish import publish
from ..fuse.metrics import ACTION
from .prediction import Prediction

MOST_WINDOWS = 1_000_000


def windows(duration_s: float, window_s: float, stride_s: float) -> list[tuple[float, float]]:
    """Return start and stop in seconds of windows from 0 on, each `stride_s` after the one before.

    All are `window_s` long.  Where the last of them does not reach the end, one more ends with the film; a film that
    is shorter than a window is one.  Raises ConfigError unless window and stride are above 0, and for a stride of
    which there would be more than a million.
    """
    if not (0 < window_s < float("inf") and 0 < stride_s < float("inf")):
        raise ConfigError(f"window = {window_s:g} s, stride = {stride_s:g} s: expected seconds above 0.")
    if duration_s / stride_s > MOST_WINDOWS:
        raise ConfigError(f"stride = {stride_s:g} s: more than a million windows in {duration_s:.0f} s. Choose more.")
    if duration_s <= window_s + EPSILON_S:
        return [(0.0, duration_s)]
    n_whole = int((duration_s + EPSILON_S - window_s) / stride_s) + 1
    spans = [(at * stride_s, at * stride_s + window_s) for at in range(n_whole)]
    if spans[-1][1] < duration_s - EPSILON_S:
        return [*spans, (duration_s - window_s, duration_s)]
    return [*spans[:-1], (spans[-1][0], duration_s)]


def write_timeline(path: Path, said: Sequence[Prediction], top: int) -> None:
    """Write a CSV file, one row a prediction: file, start_s, stop_s (empty: the end), modalities, and of each head,
    and of the action, `<head>_1`, `<head>_1_prob` to `<head>_<top>_prob`, the likeliest first.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = {head: min(top, len(names)) for head, names in said[0].classes.items()} if said else {}
    if said and said[0].actions(1):
        heads[ACTION] = len(said[0].actions(top))
    columns = [
        f"{head}_{place}{kind}" for head, n in heads.items() for place in range(1, n + 1) for kind in ("", "_prob")
    ]
    writer.writerow(["file", "start_s", "stop_s", "modalities", *columns])
    for one in said:
        ranked = [*(one.top(head, top) for head in one), joined_actions(one, top)]
        cells = [cell for found in ranked for name, prob in found for cell in (name, f"{prob:.4f}")]
        stop = "" if one.stop_s is None else f"{one.stop_s:.3f}"
        writer.writerow([one.path, f"{one.start_s:.3f}", stop, letters(one.present), *cells])
    publish(path, text.getvalue().encode())


def joined_actions(one: Prediction, top: int) -> list[tuple[str, float]]:
    """Return the likeliest actions as text, such as 'open + drawer', with their probabilities."""
    return [(" + ".join(names), prob) for names, prob in one.actions(top)]


def captions(said: Sequence[Prediction]) -> list[Caption]:
    """Return what to draw into one film: at each moment the likeliest classes of the window whose middle is nearest.

    A moment in no window, or in one that failed, has no caption.
    """
    spans = [(one.start_s, float("inf") if one.stop_s is None else one.stop_s) for one in said]
    found = []
    for at, (one, (start_s, stop_s)) in enumerate(zip(said, spans, strict=True)):
        begin = max(start_s, _between(spans[at - 1], spans[at])) if at else start_s
        # The last frame may begin a hair after what the film's length says.
        end = min(stop_s, _between(spans[at], spans[at + 1])) if at + 1 < len(spans) else stop_s + EPSILON_S
        lines = tuple(f"{head}: {name} {prob:.0%}" for head in one for name, prob in one.top(head, 1))
        found.append(Caption(begin, end, (*lines, letters(one.present))))
    return found


def _between(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Return the moment that is as far from the middle of one span as from that of another."""
    return (sum(one) + sum(other)) / 4
