"""A cache that something has spoiled: every command ends in the right answer, or in a line that says what to do."""

import json
import os
import random
import shutil
import time

import pytest

DAMAGED = 4
# A clock that was set back by a year, as far as a program can ask for the time of day.
SET_BACK = """
import time
now, now_ns = time.time, time.time_ns
time.time = lambda: now() - 31e6
time.time_ns = lambda: now_ns() - 31 * 10**15
"""
# Seconds until a lease at rest belongs to a dead owner, for a test that has no minute to wait.
SOON = "from karmma.data import leases; leases.Leases.__init__.__defaults__ = (0.1, 1.0)"


@pytest.fixture
def cache(clean, files_of, tmp_path):
    """What lies in a cache that is complete."""
    return files_of(shutil.copytree(clean, tmp_path / "cache"))


@pytest.fixture
def train(start, tmp_path):
    def begin(name, command="train-teacher", **changes):
        return start(name, command, "--runs", tmp_path / "runs", **changes)

    return begin


def shards(cache):
    return sorted(cache.cache.glob("tokens/*/*.zarr/tokens/c/*/0/0/0"))


def refused(running, *parts, code=1):
    ended, said = running.ended()
    assert ended == code, said
    assert "Traceback" not in said
    assert all(part in said for part in parts), said


def repaired(start, cache, extracted):
    """Give the commands that the line named; require the bytes of the cache that nobody disturbed."""
    receipts = cache.receipts
    refused(start("drop", "cache verify", "--drop"), "damaged shards count as not there now", code=DAMAGED)
    start("extract", "extract").succeeded()
    assert cache.tokens == extracted.tokens
    assert len(receipts.items() - cache.receipts.items()) == 1


@pytest.mark.parametrize("seed", range(4))
def test_flipped_byte_is_refused_by_training_with_its_file_and_clips_and_mended(start, train, cache, extracted, seed):
    draw = random.Random(seed)
    file = draw.choice(shards(cache))
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    said = (str(file), "fails its checksum", "clip_00")
    refused(train("teach"), *said, "Run karmma cache verify --drop, then karmma extract")
    assert not (cache.cache / "logits").exists()
    refused(start("verify", "cache verify"), *said, code=DAMAGED)
    repaired(start, cache, extracted)


def test_truncated_shard_counts_as_not_there_and_is_made_again(start, train, cache, extracted):
    file = shards(cache)[3]
    os.truncate(file, file.stat().st_size // 2)
    refused(train("teach"), "audio: 2 of 15 clips are not extracted as the table has them. Run karmma extract")
    kept = cache.receipts
    running = start("extract", "extract").succeeded()
    assert len(running.made) == 2
    assert len(kept.items() - cache.receipts.items()) == 1
    assert cache.tokens == extracted.tokens


def test_deleted_receipt_means_that_its_shard_alone_is_made_again(start, cache, extracted):
    cache.drop_receipts(1, seed=0)
    kept = cache.receipts
    running = start("extract", "extract").succeeded()
    assert len(running.made) == 2
    assert kept.items() <= cache.receipts.items()
    assert cache.tokens == extracted.tokens


def test_flipped_byte_of_logits_is_refused_by_distillation(train, cache):
    train("teach").succeeded()
    file = next(cache.cache.glob("logits/*.zarr/verb/c/0/0/0"))
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    refused(train("distill", "distill"), str(file.parents[5]), "not what was written: verb", "karmma cache verify")


def test_clock_that_was_set_back_changes_nothing(start, train, cache, extracted, left, tmp_path):
    wanted = train("clean").succeeded() and left(next((tmp_path / "runs").iterdir()))
    shutil.rmtree(tmp_path / "runs")
    cache.drop_receipts(5, seed=1)
    future = time.time() + 1e6
    for path in (cache.cache, *cache.cache.rglob("*")):
        os.utime(path, (future, future))
    start("extract", "extract", before=SET_BACK).succeeded()
    assert cache.tokens == extracted.tokens
    assert cache.left_over == []
    train("teach", before=SET_BACK).succeeded()
    assert left(next((tmp_path / "runs").iterdir())) == wanted


def test_lease_of_a_dead_process_of_another_machine_is_taken_over(start, cache, extracted):
    (receipt,) = cache.drop_receipts(1, seed=2)
    lease = cache.cache / "leases" / receipt.parts[-4] / receipt.parts[-3] / f"view0-{receipt.stem}.0"
    lease.parent.mkdir(parents=True, exist_ok=True)
    lease.write_text(json.dumps({"owner": "x", "machine": "elsewhere", "pid": 1, "beat": 7}))
    running = start("extract", "extract", before=SOON).succeeded()
    assert len(running.made) == 2
    assert cache.tokens == extracted.tokens
    assert cache.left_over == []
