"""`karmma train-teacher` and `karmma distill` killed at random instants and resumed: the bytes of a run left alone."""

import random
import shutil
import signal
import time
from itertools import count

import pytest
from karmma.data.runs import RunFolder

pytestmark = pytest.mark.slow
N_KILLS = 30
# Marks when logits begin to be written, slowly enough that a kill can fall between any two of its files.
NOTE_LOGITS = """
import time
from karmma.data.stores import LogitStore
write = LogitStore.write
def noted(*args):
    open(folder + "/writing", "w").close()
    opened = os.open
    os.open = lambda *names, **options: (time.sleep(0.005), opened(*names, **options))[1]
    write(*args)
    os.open = opened
LogitStore.write = noted
"""


@pytest.fixture
def begin(start, clean, tmp_path):
    """Return a function that starts a training, or resumes it, on a copy of the clean cache."""
    shutil.copytree(clean, tmp_path / "cache")

    def train(name, command, runs="runs", before=""):
        return start(name, command, "--runs", tmp_path / runs, "--save-minutes", "0", "--resume", before=before)

    return train


@pytest.fixture
def outcome(left, files_of, tmp_path):
    """Return a function: all that must not differ between two finished trainings."""

    def found():
        (run,) = (tmp_path / "runs").iterdir()
        cache = files_of(tmp_path / "cache")
        assert RunFolder(run).is_finished
        assert [*cache.left_over, *run.rglob("*.tmp")] == []
        return left(run), cache.below("logits")

    return found


def kill_at_random(begin, outcome, made, first=lambda running: None, longest_s=None):
    """Kill a training, and what resumes it, `N_KILLS` times; whenever one gets to its end, compare and begin anew.

    made: the folders that a training writes into.  first: waits for what has to be so before a kill; then up to
    `longest_s` go by, by default as long as a training takes.
    """

    def finish():
        found = outcome()
        for folder in made:
            shutil.rmtree(folder)
        return found

    start_s, draw, n_killed = time.monotonic(), random.Random(3), 0
    begin("clean").succeeded()
    longest_s, wanted = longest_s or time.monotonic() - start_s, finish()
    for n in count():
        running = begin(f"run{n}")
        first(running)
        end_s = time.monotonic() + draw.uniform(0, longest_s)
        running.until(lambda end_s=end_s: time.monotonic() > end_s)
        running.kill(alone=n % 2 == 1)
        if running.process.exitcode == 0:
            assert finish() == wanted
            continue
        assert running.process.exitcode == -signal.SIGKILL, running.said
        n_killed += 1
        if n_killed == N_KILLS:
            break
    begin("last").succeeded()
    assert finish() == wanted


@pytest.fixture
def made(tmp_path):
    """The folders that a teacher's training writes into."""
    return tmp_path / "runs", tmp_path / "cache" / "logits"


def test_teacher_killed_at_random_instants_and_resumed_ends_in_the_same_bytes(begin, outcome, made):
    kill_at_random(lambda name: begin(name, "train-teacher"), outcome, made)


def test_teacher_killed_while_it_writes_logits_and_run_again_ends_in_the_same_bytes(begin, outcome, made):
    def first(running):
        running.until((running.folder / "writing").exists)

    kill_at_random(lambda name: begin(name, "train-teacher", before=NOTE_LOGITS), outcome, made, first, longest_s=0.15)


def test_student_killed_at_random_instants_and_resumed_ends_in_the_same_bytes(begin, outcome, made):
    begin("teacher", "train-teacher", "teachers").succeeded()
    kill_at_random(lambda name: begin(name, "distill"), outcome, made[:1])
