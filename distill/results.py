"""A run's results on one split, subset by subset, and their files."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..data.publish import publish, publish_json, read_json

if TYPE_CHECKING:
    import numpy as np

ACTION, DRAWS, FORMAT = "action", 5, 1
Found = Mapping[str, float | None]  # by head, and "action"; None where no clip counts


@dataclass(frozen=True)
class Asked:
    """What to evaluate.

    views: how many are averaged, the clean one first.  draws: how often missing rates are drawn; None: as often as it
    was before.  flow_weights: RAFT's,
    if that computes a student's flow.
    """

    split: str
    views: int = 1
    draws: int | None = DRAWS
    readers: int = 2
    device: str = "auto"
    flow_weights: Path | None = None

    @property
    def stem(self) -> str:
        """Name of the files, without their kind."""
        return self.split if self.views == 1 else f"{self.split}-{self.views}views"


@dataclass(frozen=True)
class SubsetRow:
    """Results of one subset of modalities on one group of clips.

    group: all, seen, unseen or tail.  accuracy, low, high: by head and of the action, 0..1, with the 95 percent Wilson
    bounds.  top5: one of five guesses is right.  ece: expected calibration error, 0..1.
    n_clips: clips counted for the action.  n_complete: of these, clips that have every modality of the subset.
    """

    group: str
    subset: str
    n_clips: int
    n_complete: int
    accuracy: Found
    low: Found
    high: Found
    top5: Found
    ece: Found


@dataclass(frozen=True)
class RateRow:
    """Accuracy where each modality of a clip is missing with probability `rate`: mean and deviation over draws."""

    rate: float
    mean: Found
    std: Found


@dataclass(frozen=True)
class ClassRow:
    """One class of a head: its clips in the split, and the share predicted right by subset."""

    head: str
    name: str
    n_clips: int
    accuracy: Mapping[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """A run's results on a split.

    draws: of missing rates.  clips: digest of the clips that were predicted.
    label: what the run is, in the paper's words.  variant: digest of its settings but the seed.  views: averaged.
    majority: accuracy of always naming the commonest class, by head and of the action.  rows: the largest subset first.
    confused: head -> [true class, predicted class, clips], the most frequent first, all modalities in.  failed: clip id
    -> reason.
    made_from: digest of the run, the clips and what was asked, so that the same evaluation is not done twice.
    """

    run: str
    label: str
    variant: str
    split: str
    views: int
    draws: int
    clips: str
    majority: Found
    rows: tuple[SubsetRow, ...]
    rates: tuple[RateRow, ...]
    classes: tuple[ClassRow, ...]
    confused: Mapping[str, Sequence[tuple[str, str, int]]]
    failed: dict[str, str]
    made_from: str

    def of(self, group: str) -> tuple[SubsetRow, ...]:
        """Return the rows of a group of clips."""
        return tuple(row for row in self.rows if row.group == group)

    @classmethod
    def read(cls, path: Path, made_from: str, draws: int | None = None) -> Self | None:
        """Return what was written as JSON, or None if there is nothing, or it was made from something else.

        draws: None takes any number.
        """
        found: dict[str, Any] = read_json(path) if path.exists() else {}
        if found.get("made_from") != made_from or draws not in (None, found.get("draws")):
            return None
        try:
            return cls.parsed(found)
        except (KeyError, TypeError):  # of another version
            return None

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> Self:
        """Return what was read from JSON; raises KeyError or TypeError if it is of another version."""
        kinds = {"rows": SubsetRow, "rates": RateRow, "classes": ClassRow}
        return cls(**{**found, **{name: tuple(kind(**row) for row in found[name]) for name, kind in kinds.items()}})

    def write(self, stem: Path, confusion: "Mapping[str, np.ndarray]") -> None:
        """Write `<stem>.csv`, `-rates.csv`, `-classes.csv`, `-confusion-<head>.csv` and, last, `<stem>.json`.

        confusion: head -> [N_h, N_h] clips by true and predicted class.
        """
        names = list(self.majority)
        measured = [(name, kind) for kind in ("accuracy", "low", "high", "top5", "ece") for name in names]
        header = [name if kind == "accuracy" else f"{name}_{kind}" for name, kind in measured]
        rows = [
            [row.group, row.subset, row.n_clips, row.n_complete, *(_cell(getattr(row, k)[n]) for n, k in measured)]
            for row in self.rows
        ]
        write_csv(stem.with_name(f"{stem.name}.csv"), ["group", "subset", "n_clips", "n_complete", *header], rows)
        rates = [[r.rate, *(_cell(part[name]) for part in (r.mean, r.std) for name in names)] for r in self.rates]
        header = ["rate", *names, *(f"{name}_std" for name in names)]
        write_csv(stem.with_name(f"{stem.name}-rates.csv"), header, rates)
        subsets = [row.subset for row in self.of("all")]
        classes = [[c.head, c.name, c.n_clips, *(_cell(c.accuracy[s]) for s in subsets)] for c in self.classes]
        write_csv(stem.with_name(f"{stem.name}-classes.csv"), ["head", "class", "n_clips", *subsets], classes)
        for head, counts in confusion.items():
            own = [c.name for c in self.classes if c.head == head]
            table = [[name, *row] for name, row in zip(own, counts, strict=True)]
            write_csv(stem.with_name(f"{stem.name}-confusion-{head}.csv"), ["true \\ predicted", *own], table)
        publish_json(stem.with_name(f"{stem.name}.json"), asdict(self))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Publish a table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    publish(path, text.getvalue().encode())


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
