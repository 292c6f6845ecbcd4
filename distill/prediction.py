"""What a student says of one stretch of a film: probabilities by head, and what they rest on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import product
from typing import Any

import numpy as np

from ..data.annotations import Clip
from ..fuse.metrics import ACTION


@dataclass(frozen=True, eq=False)
class Prediction(Mapping[str, np.ndarray]):
    """Probabilities by head, itself a mapping: `prediction["verb"]` is float32 [N_h], in the order of `classes`.

    path: the film as it was named.  start_s, stop_s: seconds, stop_s None for the end of the film.  classes: head ->
    names.  present: the modalities it rests on.  missing: the student's others -> why they are not there.  failed:
    those of the missing that are there and cannot be read.
    """

    path: str
    start_s: float
    stop_s: float | None
    probs: Mapping[str, np.ndarray]
    classes: Mapping[str, tuple[str, ...]]
    present: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    failed: tuple[str, ...] = ()

    def __getitem__(self, head: str) -> np.ndarray:
        """Return the probabilities of a head, float32 [N_h]."""
        return self.probs[head]

    def __iter__(self) -> Iterator[str]:
        """Return the heads."""
        return iter(self.probs)

    def __len__(self) -> int:
        """Return the number of heads."""
        return len(self.probs)

    def top(self, head: str, k: int = 5) -> list[tuple[str, float]]:
        """Return the k likeliest classes of a head with their probabilities, the likeliest first."""
        order = np.argsort(-self.probs[head], kind="stable")[:k]
        return [(self.classes[head][at], float(self.probs[head][at])) for at in order]

    def actions(self, k: int = 5) -> list[tuple[tuple[str, ...], float]]:
        """Return the k likeliest combinations, one class a head, with the products of their probabilities.

        Empty where there is no joint action to speak of: with one head, or one that is itself called "action".
        """
        if len(self) < 2 or ACTION in self.probs:
            return []
        # The k best combinations consist of the k best of each head: whatever beats a class beats it in all of them.
        best: list[tuple[tuple[str, ...], float]] = [((), 1.0)]
        for head in self.probs:
            pairs = product(best, self.top(head, k))
            joined = (((*names, name), share * prob) for (names, share), (name, prob) in pairs)
            best = nlargest(k, joined, key=lambda found: found[1])
        return best

    def record(self, k: int) -> dict[str, Any]:
        """Return a JSON value with the k likeliest classes of each head, and combinations."""
        found: dict[str, Any] = {
            "file": self.path,
            "start_s": self.start_s,
            "stop_s": self.stop_s,
            "modalities": list(self.present),
            "missing": dict(self.missing),
            "failed": list(self.failed),
            "heads": {head: [{"class": name, "prob": prob} for name, prob in self.top(head, k)] for head in self.probs},
        }
        joint = [{"classes": dict(zip(self.probs, names, strict=True)), "prob": p} for names, p in self.actions(k)]
        return found | ({ACTION: joint} if joint else {})


@dataclass(frozen=True)
class Failure:
    """A stretch of a film that could not be predicted, and why."""

    path: str
    start_s: float
    stop_s: float | None
    reason: str

    def record(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {"file": self.path, "start_s": self.start_s, "stop_s": self.stop_s, "reason": self.reason}

    def __str__(self) -> str:
        """Return it as one line."""
        where = clip_name(self.path, self.start_s, self.stop_s)
        return f"{where}: {self.reason.removeprefix(f'{self.path}: ')}"


def failure(clip: Clip, reason: str) -> Failure:
    """Return why a clip could not be predicted."""
    return Failure(clip.clip_id, clip.start_s, clip.stop_s, reason)


def clip_name(path: str, start_s: float, stop_s: float | None) -> str:
    """Return what a message calls a stretch of a film."""
    if stop_s is None:
        return path if start_s == 0 else f"{path} from {start_s:g} s"
    return f"{path}, {start_s:g} to {stop_s:g} s"
