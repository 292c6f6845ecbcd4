"""The three commands and evaluate on real talking faces with sound, through a plain CSV of one's own."""

import csv
import json

import pytest
from karmma.cli import main

TOML = """preset = "tiny"
[data]
table = "mine.csv"
heads = ["verb", "colour"]
modalities = ["video", "flow", "audio"]
"""
SPLITS = ["train"] * 14 + ["val"] * 4 + ["test"] * 6


@pytest.fixture
def mine(shared, tmp_path, monkeypatch):
    """24 GRID clips in a table of one's own, in the working folder."""
    with open(shared / "data/grid/clips.csv", newline="") as file:
        rows = list(csv.DictReader(file))[::41][:24]
    with open(tmp_path / "mine.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip_id", "video", "start_s", "stop_s", "split", "verb", "colour"])
        for row, split in zip(rows, SPLITS, strict=True):
            video = shared / "data/grid" / row["video"]
            writer.writerow([row["clip_id"], video, row["start_s"], row["stop_s"], split, row["verb"], row["colour"]])
    (tmp_path / "karmma.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_real_clips_go_through_all_commands(mine, monkeypatch, capsys):
    quick = ["--epochs", "3", "--threads", "1"]
    for command in (["extract"], ["train-teacher", "--cache", "./cache", *quick], ["distill", *quick], ["evaluate"]):
        monkeypatch.setattr("sys.argv", ["karmma", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None), capsys.readouterr().err
    (student,) = mine.glob("runs/student-*")
    found = json.loads((student / "evaluation/test.json").read_text())
    rows = [row for row in found["rows"] if row["group"] == "all"]
    assert [row["subset"] for row in rows] == ["V+F+A", "V+F", "V+A", "F+A", "V", "F", "A"]
    assert all(row["n_clips"] == row["n_complete"] == 6 for row in rows)
    assert set(found["majority"]) == {"verb", "colour", "action"}
    assert found["failed"] == {}
    losses = [json.loads(line)["loss"] for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
