"""A student's results on one split: one row a subset of modalities, and its files."""

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ..data.publish import publish, publish_json, read_json


@dataclass(frozen=True)
class SubsetRow:
    """Results of one subset of modalities on one split.

    accuracy, low, high: by head and of the action, 0..1, with the 95 percent Wilson bounds.
    n_clips: clips counted.  n_complete: clips that have every modality of the subset.
    """

    subset: str
    n_clips: int
    n_complete: int
    accuracy: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """A run's table of subsets on a split.

    majority: accuracy of always naming the commonest class, by head and of the action.  failed: clip id -> reason.
    made_from: digest of the run and the clips, so that the same evaluation is not done twice.
    """

    run: str
    split: str
    majority: dict[str, float]
    rows: tuple[SubsetRow, ...]
    failed: dict[str, str]
    made_from: str

    @classmethod
    def read(cls, folder: Path, split: str, made_from: str) -> Self | None:
        """Return what was written for a split, or None if there is nothing, or it was made from something else."""
        path = folder / f"{split}.json"
        found: dict[str, Any] = read_json(path) if path.exists() else {}
        if found.get("made_from") != made_from:
            return None
        return cls(**{**found, "rows": tuple(SubsetRow(**row) for row in found["rows"])})

    def write(self, folder: Path) -> None:
        """Write `<split>.csv` and, last, `<split>.json`."""
        names, text = list(self.majority), io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["subset", "n_clips", "n_complete", *names, *(f"{name}_low" for name in names)])
        for row in self.rows:
            values = [f"{value[name]:.4f}" for value in (row.accuracy, row.low) for name in names]
            writer.writerow([row.subset, row.n_clips, row.n_complete, *values])
        publish(folder / f"{self.split}.csv", text.getvalue().encode())
        publish_json(folder / f"{self.split}.json", asdict(self))
