"""Runs side by side: seeds averaged, dense ranks, the rows of Tab. 1."""

import csv
import json

import pytest
from karmma.data.errors import RunError
from karmma.distill.compare import compare, dense_ranks, latex, write_comparison
from karmma.distill.results import Evaluation, RateRow, SubsetRow

# Tab. 1 of the paper, Epic-Kitchens: V+F+A, V+F and A.
TAB_1 = {
    "Baseline": {"V+F+A": 0.4000, "V+F": 0.3680, "A": 0.0205},
    "Baseline w/ delta": {"V+F+A": 0.4149, "V+F": 0.3969, "A": 0.0623},
    "KARMMA_S": {"V+F+A": 0.4255, "V+F": 0.4070, "A": 0.0623},
}


def evaluation(label, accuracies, run="run-1", variant=None, rates=(0.0, 0.5)):
    """Return an evaluation with given action accuracies by subset; the verb is always 10 points better."""
    rows = []
    for subset, value in accuracies.items():
        found = {"action": value, "verb": value + 0.1}
        rows.append(SubsetRow("all", subset, 100, 100, found, found, found, found, found))
    curve = tuple(RateRow(rate, {"action": 0.4 - rate / 4}, {"action": 0.01}) for rate in rates)
    common = {"action": 0.02, "verb": 0.2}
    return Evaluation(run, label, variant or label, "test", 1, 5, "c" * 16, common, tuple(rows), curve, (), {}, {}, "")


def test_dense_ranks_share_ties_as_printed_and_leave_no_gap():
    assert dense_ranks([0.4255, 0.41491, 0.41494, 0.40, None]) == [1, 2, 2, 3, 4]


def test_dense_ranks_of_tab_b1_are_the_published_ones():
    """V+F+A of Tab. B.1: no dropout, dropout, and Eq. B.1 to B.5."""
    assert dense_ranks([0.3894, 0.3982, 0.3958, 0.3987, 0.3941, 0.3958, 0.3987]) == [5, 2, 3, 1, 4, 3, 1]


def test_average_rank_is_over_subsets():
    columns = compare([evaluation(label, found) for label, found in TAB_1.items()])
    assert [column.rank for column in columns] == [pytest.approx(8 / 3), pytest.approx(5 / 3), pytest.approx(1)]


def test_seeds_of_one_variant_are_averaged_with_their_deviation():
    runs = [evaluation("KARMMA_S", {"V": value}, run=f"s{value}", variant="x") for value in (0.3, 0.4, 0.5)]
    (column,) = compare(runs)
    assert column.runs == ("s0.3", "s0.4", "s0.5")
    assert column.mean["V"]["action"] == pytest.approx(0.4)
    assert column.std["V"]["action"] == pytest.approx(0.1)
    assert column.rates[0.5] == (pytest.approx(0.275), pytest.approx(0.0))
    assert column.rank is None


def test_one_run_keeps_the_deviation_over_draws():
    (column,) = compare([evaluation("KARMMA_S", {"V": 0.3})])
    assert column.std["V"]["action"] is None
    assert column.rates[0.0] == (pytest.approx(0.4), 0.01)


def test_subsets_that_all_have_are_compared():
    columns = compare([evaluation("KARMMA_S", {"V+F": 0.4, "V": 0.3}), evaluation("KARMMA_V", {"V": 0.35})])
    assert [list(column.mean) for column in columns] == [["V"], ["V"]]
    with pytest.raises(RunError, match="no subset of modalities in common"):
        compare([evaluation("KARMMA_V", {"V": 0.4}), evaluation("KARMMA_A", {"A": 0.1})])


def test_runs_of_other_heads_are_refused():
    other = evaluation("KARMMA_S", {"V": 0.4})
    other.majority["noun"] = 0.1
    with pytest.raises(RunError, match="has the heads action, verb, noun, run-1 action, verb"):
        compare([evaluation("Baseline", {"V": 0.4}), other])


def test_equal_labels_are_told_apart_by_the_run():
    columns = compare([evaluation("KARMMA_S", {"V": 0.4}, "one", "x"), evaluation("KARMMA_S", {"V": 0.4}, "two", "y")])
    assert [column.label for column in columns] == ["KARMMA_S (one)", "KARMMA_S (two)"]


def test_latex_has_the_rows_of_tab_1_with_best_and_second():
    rows = latex(compare([evaluation(label, found) for label, found in TAB_1.items()])).splitlines()
    assert rows[1:4] == [
        r"Baseline &  & 40.00 \\",
        r"Baseline w/ $\delta$ & V+F+A & \underline{41.49} \\",
        r"KARMMA\textsubscript{S} &  & \textbf{42.55} \\",
    ]
    assert rows[4] == r"\midrule"
    assert rows[-2:] == [
        r"Baseline w/ $\delta$ & A & \textbf{6.23} \\",
        r"KARMMA\textsubscript{S} &  & \textbf{6.23} \\",
    ]


def test_latex_of_a_run_with_a_strange_name_is_text():
    columns = compare([evaluation("KARMMA_S", {"V": 0.4}, name, name) for name in ("run#1&2_my-delta", "b")])
    assert latex(columns).splitlines()[1].startswith(r"KARMMA\textsubscript{S} (run\#1\&2\_my-delta) & V & ")


def test_latex_of_seeds_shows_the_deviation():
    runs = [evaluation("KARMMA_S", {"V": value}, run=f"s{value}", variant="x") for value in (0.3, 0.5)]
    assert latex(compare(runs)).splitlines()[1] == r"KARMMA\textsubscript{S} & V & 40.00 $\pm$ 14.14 \\"


def test_files_hold_every_number(tmp_path):
    paths = write_comparison(compare([evaluation(label, found) for label, found in TAB_1.items()]), tmp_path / "c")
    assert [path.name for path in paths] == ["c.csv", "c-rates.csv", "c.json", "c.tex"]
    assert paths[1].read_text().splitlines()[1] == "Baseline,0.0,0.4000,0.0100"
    assert json.loads(paths[2].read_text())[2]["mean"]["A"]["action"] == 0.0623
    rows = list(csv.DictReader(paths[0].read_text().splitlines()))
    assert len(rows) == 9
    assert rows[0] == {
        "method": "Baseline", "runs": "run-1", "average_rank": "2.67", "subset": "V+F+A", "action": "0.4000",
        "verb": "0.5000", "action_std": "", "verb_std": "",
    }  # fmt: skip
