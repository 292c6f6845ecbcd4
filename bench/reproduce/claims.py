"""What the paper leads one to expect, held against what was found."""

import statistics
from collections.abc import Mapping, Sequence

from karmma.distill.compare import Column
from karmma.distill.efficiency import Efficiency
from karmma.distill.results import ACTION
from karmma.distill.variants import BASELINE, DELTA

STUDENT = "KARMMA_S"
LEAST_RATE = 0.3


def claims(columns: Mapping[str, Column], costs: Sequence[Efficiency]) -> list[list[str]]:
    """Return rows: what is expected, what was found, and whether that holds.

    columns: by label, of Baseline, Baseline w/ delta and KARMMA_S; raises KeyError for one that is not there.
    costs: of teacher and student; without them nothing is said of GFLOPs.
    """
    baseline, delta, student = columns[BASELINE], columns[DELTA], columns[STUDENT]
    rows = []
    for better, worse in ((student, delta), (delta, baseline)):
        gap = mean(better) - mean(worse)
        rows.append([f"{better.label} above {worse.label}, mean over subsets", _points(gap), holds(gap > 0)])
        gaps = {
            rate: better.rates[rate][0] - worse.rates[rate][0] for rate in better.rates if rate >= LEAST_RATE - 1e-9
        }
        least = min(gaps, key=gaps.get)
        said = f"least at {100 * least:.0f} %: {_points(gaps[least])}"
        expected = f"{better.label} above {worse.label} at every missing rate from {100 * LEAST_RATE:.0f} %"
        rows.append([expected, said, holds(gaps[least] > 0)])
    ours, theirs = drop(student), drop(baseline)
    said = f"{100 * ours:.1f} against {100 * theirs:.1f} points"
    expected = f"{STUDENT} loses at 90 % missing at most half of what {BASELINE} loses"
    rows.append([expected, said, holds(ours <= theirs / 2)])
    if costs:
        shares = {ours.subset: ours.gflops / all_.gflops for all_, ours in zip(*(c.rows for c in costs), strict=True)}
        most = max(shares, key=shares.get)
        said = f"at most {100 * shares[most]:.1f} % ({most})"
        rows.append(
            ["the student has at most half of the teacher's GFLOPs, in every subset", said, holds(shares[most] <= 0.5)]
        )
    return rows


def mean(column: Column) -> float:
    """Return the mean over subsets of the action accuracy."""
    return statistics.fmean(values[ACTION] for values in column.mean.values())


def drop(column: Column) -> float:
    """Return what is lost from nothing missing to 90 percent."""
    return column.rates[min(column.rates)][0] - column.rates[max(column.rates)][0]


def holds(is_so: bool) -> str:
    """Return the word for it."""
    return "holds" if is_so else "**fails**"


def _points(gap: float) -> str:
    return f"{100 * gap:+.1f} points"
