"""What the paper leads one to expect, held against what was found."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from karmma.distill.compare import Column
from karmma.distill.efficiency import Efficiency
from karmma.distill.variants import BASELINE, DELTA

STUDENT = "KARMMA_S"
LEAST_RATE = 0.3


def claims(
    columns: Mapping[str, Column], means: Mapping[str, Sequence[float]], costs: Sequence[Efficiency]
) -> list[list[str]]:
    """Return rows: what is expected, what was found, and whether that holds.

    columns: by label, of Baseline, Baseline w/ delta and KARMMA_S; raises KeyError for one that is not there.
    means: by label, of each run the mean over subsets.  costs: of teacher and student; without them nothing is said of
    GFLOPs.  A gap that is less than twice its standard error over seeds is not shown to be one.
    """
    baseline, delta, student = columns[BASELINE], columns[DELTA], columns[STUDENT]
    rows = []
    for better, worse in ((student, delta), (delta, baseline)):
        gap = _gap(_summary(means[better.label]), _summary(means[worse.label]))
        rows.append([f"{better.label} above {worse.label}, mean over subsets", _points(gap), _verdict([gap])])
        gaps = {
            rate: _gap(*((*column.rates[rate], len(column.runs)) for column in (better, worse)))
            for rate in better.rates
            if rate >= LEAST_RATE - 1e-9
        }
        least = min(gaps, key=gaps.get)
        said = f"least at {100 * least:.0f} %: {_points(gaps[least])}"
        expected = f"{better.label} above {worse.label} at every missing rate from {100 * LEAST_RATE:.0f} %"
        rows.append([expected, said, _verdict(gaps.values())])
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


def _summary(found: Sequence[float]) -> tuple[float, float, int]:
    """Return mean, deviation (0 for a single run) and number of runs."""
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found)


def _gap(better: tuple[float, float, int], worse: tuple[float, float, int]) -> tuple[float, float]:
    """Return by how much one mean is above another, and its standard error; each: mean, deviation, number of runs."""
    return better[0] - worse[0], math.sqrt(sum(std**2 / n for _, std, n in (better, worse)))


def _verdict(gaps: Iterable[tuple[float, float]]) -> str:
    """Return whether all gaps are above 0, and above what seeds alone may do."""
    gaps = list(gaps)
    if min(gap for gap, _ in gaps) > 0 and any(gap < 2 * error for gap, error in gaps):
        return "**not shown**"
    return holds(min(gap for gap, _ in gaps) > 0)


def drop(column: Column) -> float:
    """Return what is lost from nothing missing to 90 percent."""
    return column.rates[min(column.rates)][0] - column.rates[max(column.rates)][0]


def holds(is_so: bool) -> str:
    """Return the word for it."""
    return "holds" if is_so else "**fails**"


def _points(gap: tuple[float, float]) -> str:
    return f"{100 * gap[0]:+.1f} ± {100 * gap[1]:.1f} points"
