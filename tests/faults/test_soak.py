"""Five thousand clips through extraction and one epoch of a student: memory, open files and threads stay flat."""

import csv
import statistics
import time

import psutil
import pytest

pytestmark = pytest.mark.slow
N_CLIPS = 5000
# A part of the time, in which caches of libraries fill up, is not looked at; what is later may be so much more.
WARM, MORE_BYTES = 0.3, 48 * 2**20


@pytest.fixture
def many(sample, tmp_path):
    """A table of so many spans of the sample's clips, all of them different."""
    with open(sample / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    spans = [(row, at) for at in range(-(-N_CLIPS // len(rows))) for row in rows][:N_CLIPS]
    with open(tmp_path / "many.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        for row, at in spans:
            start_s = float(row["start_s"] or 0) + 0.001 * at
            files = {name: sample / row[name] for name in ("video", "detections")}
            table.writerow(row | files | {"clip_id": f"{row['clip_id']}-{at}", "start_s": start_s, "split": "train"})
        validation = {name: sample / rows[0][name] for name in ("video", "detections")} | {"split": "val"}
        table.writerow(rows[0] | validation)
    return tmp_path / "many.csv"


def looked_at(running):
    """Return (bytes, open files, threads) of a command and its readers, a few times a second until it ends."""
    process, seen = psutil.Process(running.pid), []
    while running.process.is_alive():
        try:
            family = [process, *process.children(recursive=True)]
            seen.append((
                sum(one.memory_info().rss for one in family),
                sum(one.num_fds() for one in family),
                sum(one.num_threads() for one in family),
            ))  # fmt: skip
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.25)
    assert running.ended()[0] == 0, running.said
    return seen


def require_flat(seen):
    """Require that the second half is not above the first, warm-up left out."""
    seen = seen[int(WARM * len(seen)) : -2]  # at its end it opens what it writes
    assert len(seen) > 30
    half = len(seen) // 2
    early, late = (list(zip(*part, strict=True)) for part in (seen[:half], seen[half:]))
    assert statistics.median(late[0]) < statistics.median(early[0]) + MORE_BYTES
    for before, after in zip(early[1:], late[1:], strict=True):  # a shard that is being written has one of each
        assert max(after) <= max(before) + 1


def test_extraction_and_a_students_epoch_stay_flat_over_five_thousand_clips(start, many, tmp_path):
    require_flat(looked_at(start("extract", "extract", "--table", many, "--shard-rows", 50, "--batch-size", 16)))
    options = ("--table", many, "--runs", tmp_path / "runs", "--variant", "delta", "--epochs", 1, "--warmup-epochs", 0)
    require_flat(looked_at(start("distill", "distill", *options, "--batch-size", 16, "--input-cache-mb", 0)))
