"""Progress: a bar with rate and time left on a terminal, plain lines elsewhere."""

import io

import pytest
from karmma.data import progress
from rich.console import Console


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move by hand."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_tell_count_rate_and_time_left(clock, capsys):
    with progress.watched("extract", 40, "clips") as task:
        for _ in range(4):
            clock[0] += 2
            task.advance(10, "shard 3")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["extract: 30/40 clips, 5.0/s, 2 s left  shard 3", "extract: 40/40 clips, 5.0/s, 0 s left  shard 3"]


def test_what_takes_longer_than_a_second_is_told_in_seconds_for_one(clock, capsys):
    with progress.watched("sweep", 8, "epochs") as task:
        clock[0] += 40
        task.advance(2)
    assert capsys.readouterr().err == "sweep: 2/8 epochs, 20.0 s each, 120 s left\n"


def test_terminal_shows_a_bar_with_rate_time_left_and_note(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=out, force_terminal=True, width=160))
    with progress.watched("extract", 4, "clips") as task:
        task.advance(2, "loss 1.25")
        task.advance(2)
    text = out.getvalue()
    assert "4/4" in text
    assert "clips/s" in text
    assert "0:00:00" in text
    assert "loss 1.25" in text
