"""A million clips: the simulated cache of bench/scale.py opens, plans and reads, in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench/scale.py"


@pytest.mark.slow
def test_cache_of_a_million_clips_opens_in_less_than_a_gigabyte(tmp_path):
    command = [sys.executable, BENCH, "--repeats", "1", "--json", "--folder", tmp_path / "scale"]
    found = json.loads(subprocess.check_output(command))
    assert found["clips"] == 1_000_000
    assert 0 < found["GiB"] < 1
    assert min(found[step] for step in ("open", "plan", "first batch")) > 0
