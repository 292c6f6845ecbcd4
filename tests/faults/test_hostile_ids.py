"""Clip ids, classes and file names that would like to be paths, markup or commands: they are text, and nothing else."""

import csv
from pathlib import Path

import pytest

MARK = "ESCAPED7f3a"
IDS = (
    f"../../{MARK}", f"/tmp/{MARK}", f"..\\{MARK}", "..", ".", "/", "~", f"a/b/{MARK}", f"a\nb{MARK}", "\r\x1b[31mred",
    f"<script>{MARK}()</script>", f"<img src=x onerror={MARK}()>", "x" * 10_000, f"$({MARK})", "a\u202eb",
)  # fmt: skip


@pytest.fixture
def hostile(sample, tmp_path):
    """A table of the sample's clips under hostile ids and classes."""
    with open(sample / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(tmp_path / "hostile.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        for at, row in enumerate(rows):
            files = {name: sample / row[name] for name in ("video", "detections")}
            verb = f"../{MARK}<b onclick={MARK}()>" if row["verb"] == rows[0]["verb"] else row["verb"]
            table.writerow(row | files | {"clip_id": IDS[at], "verb": verb})
    return tmp_path / "hostile.csv"


def test_whole_pipeline_takes_hostile_ids_for_text(start, hostile, cache, tmp_path):
    where = ("--table", hostile, "--runs", tmp_path / "runs")
    start("extract", "extract", "--table", hostile).succeeded()
    start("teach", "train-teacher", *where).succeeded()
    start("distill", "distill", *where, "--inputs", tmp_path / "inputs", "--decoded-gb", 1).succeeded()
    (run,) = (tmp_path / "runs").glob("student-*")
    start("evaluate", "evaluate", run, "--table", hostile).succeeded()
    said = start("report", "report", run, "--table", hostile, "--into", tmp_path / "page").succeeded().said
    start("verify", "cache verify").succeeded()
    assert "\x1b[31m" not in said
    cache.require_sound()
    assert len([path for path in (tmp_path / "inputs").rglob("*") if path.is_file()]) > 10
    assert not [path for path in tmp_path.rglob("*") if MARK in path.name or "script" in path.name]
    above = (Path("/tmp"), Path.cwd(), Path.home(), *tmp_path.parents[:3])
    assert not [path for folder in above for path in folder.glob(f"*{MARK}*")]
    (page,) = (tmp_path / "page").glob("*.html")
    text = page.read_text()
    assert MARK in text
    for markup in ("<script", "<img src=x", "<b onclick"):
        assert markup not in text


def test_failures_of_hostile_ids_are_one_line_each_that_a_terminal_does_not_obey(start, hostile):
    hostile.write_bytes(hostile.read_bytes().replace(b".mp4", b".none"))
    code, said = start("extract", "extract", "--table", hostile, "--modality", "audio").ended()
    assert code == 3
    failed = [line for line in said.splitlines() if line.startswith("failed: audio of ")]
    assert len(failed) == 10  # and the line that counts the rest
    assert all(line.isprintable() for line in failed)
    assert "\\x1b[31mred" in said
