"""`karmma extract` killed at any instant, and side by side with others: the bytes of one clean run, nothing twice."""

import os
import random
import re
import shutil
import signal
import time
from itertools import count

import pytest
from karmma.data.cache import Cache
from karmma.data.verify import verify

N_CLIPS = 15
GIVE_NOTHING_BACK = """
from karmma.data.leases import Leases
give_back = Leases.give_back
def killed(self, name):
    os.kill(os.getpid(), 9) if name != "planner" else give_back(self, name)
Leases.give_back = killed
"""


def leases_of(receipts):
    """Return the leases under which shards with these receipts were made."""
    return {f"{path.parts[-4]}/{path.parts[-3]}/view0-{path.stem}" for path in receipts}


def leases_in(rows):
    return {row.split()[0] for row in rows}


def require_kept(cache, kept, *rows):
    """Require that shards with receipts are as they were, and that none of them was among the rows that were made."""
    assert {path: about for path, about in cache.receipts.items() if path in kept} == kept
    assert not leases_of(kept) & leases_in(row for made in rows for row in made)


def require_same(cache, extracted):
    assert cache.tokens == extracted.tokens
    assert Cache(cache.cache).clip_ids == Cache(extracted.cache).clip_ids
    assert cache.left_over == []


def survive(start, extracted, cache, wait, n_kills, n_processes=1):
    """Start the command again and again, kill it as `wait` ends, so often in all, and let the last one finish."""
    n_killed = 0
    for n in count():
        if len(cache.receipts) == len(extracted.receipts):  # else the rest would be killed for nothing
            cache.drop_receipts(9, seed=n)
        kept = cache.receipts
        running = [start(f"run{n}-{at}", "extract") for at in range(n_processes)]
        wait(running[0], n)
        for one in running:
            one.kill(alone=n % 2 == 1)
        require_kept(cache, kept, *(one.made for one in running))
        cache.require_sound()
        codes = {one.process.exitcode for one in running}
        assert codes <= {0, -signal.SIGKILL}
        n_killed += -signal.SIGKILL in codes
        if n_killed == n_kills:
            break
    kept = cache.receipts
    last = start("last", "extract").succeeded()
    require_kept(cache, kept, last.made)
    cache.require_sound()
    require_same(cache, extracted)


def test_killed_at_three_instants_and_run_again_gives_the_bytes_of_one_clean_run(start, extracted, cache):
    draw = random.Random(4)

    def wait(running, n):
        n_receipts = (0, 1, 6)[min(n, 2)]
        running.until(lambda: len(cache.receipts) >= n_receipts)
        time.sleep(draw.uniform(0, 0.1))

    survive(start, extracted, cache, wait, n_kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [1, 4])
def test_killed_at_thirty_random_instants_gives_the_bytes_of_one_clean_run(
    start, extracted, cache, launch, sample, tmp_path, n_processes
):
    draw, begun_s = random.Random(n_processes), time.monotonic()
    plain = ("--config", sample / "settings.toml", "--cache", tmp_path / "plain")
    for running in [launch(tmp_path / f"plain{at}", "extract", *plain) for at in range(n_processes)]:
        running.succeeded()
    longest_s = time.monotonic() - begun_s

    def wait(running, n):
        end_s = time.monotonic() + draw.uniform(0, longest_s)
        running.until(lambda: time.monotonic() > end_s)

    survive(start, extracted, cache, wait, 30, n_processes)


def test_lease_of_a_process_killed_after_the_last_receipt_does_not_stay(start, clean, extracted, cache):
    shutil.copytree(clean, cache.cache)
    sorted(cache.receipts)[-1].unlink()
    assert start("killed", "extract", before=GIVE_NOTHING_BACK).ended()[0] == -signal.SIGKILL
    assert len(cache.receipts) == len(extracted.receipts)
    assert cache.left_over != []
    assert "Nothing to do" in start("again", "extract").succeeded().said
    assert cache.left_over == []


def test_two_processes_at_once_make_every_row_once_and_the_bytes_of_one(start, extracted, cache):
    first = start("first", "extract")
    first.until(lambda: first.made)
    os.kill(first.pid, signal.SIGSTOP)  # until the second one is at work too
    second = start("second", "extract")
    second.until(lambda: second.made)
    os.kill(first.pid, signal.SIGCONT)
    one, two = first.succeeded().made, second.succeeded().made
    assert len([*one, *two]) == len({*one, *two}) == 2 * N_CLIPS
    require_same(cache, extracted)
    counts = [int(re.search(r"Extracted (\d+)", running.said)[1]) for running in (first, second)]
    assert counts == [len(one), len(two)]


def test_shards_of_a_process_that_is_killed_are_taken_over_by_the_one_beside_it(start, extracted, cache):
    first = start("first", "extract")
    first.until(lambda: cache.receipts)
    os.kill(first.pid, signal.SIGSTOP)
    kept = cache.receipts
    assert cache.left_over
    second = start("second", "extract")
    second.until(lambda: second.made)
    first.kill()
    require_kept(cache, kept, second.succeeded().made)
    require_same(cache, extracted)


@pytest.mark.parametrize("longer_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_with_tables_of_different_length_end_in_the_cache_of_the_longer(
    start, extracted, cache, sample, longer_first
):
    tables = [("--table", sample / name) for name in ("some.csv", "all.csv")]
    first = start("first", "extract", *tables[longer_first])
    first.until(lambda: first.made)
    os.kill(first.pid, signal.SIGSTOP)
    second = start("second", "extract", *tables[not longer_first])
    time.sleep(0.5)
    os.kill(first.pid, signal.SIGCONT)
    first.succeeded(), second.succeeded()
    require_same(cache, extracted)
    assert list(verify(Cache(cache.cache))) == []
