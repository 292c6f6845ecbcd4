"""What the demo must show: every modality tells what it should, and none alone comes near all together."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

INFORMS = {"V": ("verb", "noun"), "F": ("verb",), "A": ("noun",), "D": ("verb",)}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The evaluation that `karmma demo` leaves behind, at full size."""
    folder = tmp_path_factory.mktemp("demo")
    code = "from karmma.cli import main; main()"
    command = [sys.executable, "-c", code, "demo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "test.html" in done.stderr
    (path,) = folder.glob("runs/student-*/evaluation/test.json")
    found = json.loads(path.read_text())
    return {**found, "rows": [row for row in found["rows"] if row["group"] == "all"]}


def test_every_modality_tells_each_head_that_it_informs(demo):
    rows = {row["subset"]: row for row in demo["rows"]}
    for subset, heads in INFORMS.items():
        for head in heads:
            assert rows[subset]["low"][head] > demo["majority"][head], (subset, head)


def test_no_single_modality_comes_within_10_points_of_all_together(demo):
    rows = {row["subset"]: row["accuracy"]["action"] for row in demo["rows"]}
    assert max(rows[subset] for subset in INFORMS) < rows["V+F+A+D"] - 0.10


def test_sample_has_at_least_4_verbs_and_6_nouns(demo):
    assert demo["majority"]["verb"] <= 0.30
    assert demo["majority"]["noun"] <= 0.20
    assert demo["rows"][0]["n_clips"] == 120
