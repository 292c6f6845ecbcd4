"""A Dask worker killed in mid-shard, and the scheduler killed: the bytes of a clean run, or one line and no loss."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
DASK = str(Path(sys.executable).with_name("dask"))


@pytest.fixture
def dask(tmp_path):
    """Return a function that starts a part of a Dask cluster; all of them end with the test."""
    parts = []

    def begin(*words):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        parts.append(subprocess.Popen([DASK, *words], **quiet, cwd=tmp_path, start_new_session=True))
        return parts[-1]

    yield begin
    for part in parts:
        with suppress(ProcessLookupError):
            os.killpg(part.pid, signal.SIGKILL)
        part.wait()


@pytest.fixture
def address():
    """A free address on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def cache(files_of, tmp_path):
    return files_of(tmp_path / "cache")


def scheduler_at(dask, address):
    return dask("scheduler", "--host", address, "--no-dashboard", "--no-show")


def workers_at(dask, address, n):
    for at in range(n):
        dask("worker", address, "--nthreads", "1", "--name", f"w{at}", "--no-dashboard", "--death-timeout", "60")


def pid_in_mid_shard(cache):
    """Return the process that is making a shard just now, or nothing."""
    for lease in (cache.cache / "leases").rglob("view*"):
        with suppress(FileNotFoundError, ValueError):  # given back just now, or not yet written
            return json.loads(lease.read_bytes())["pid"]


def kill_in_mid_shard(running, cache):
    """Kill the next worker that makes a shard; return its process."""
    found = []
    running.until(lambda: found.append(pid_in_mid_shard(cache)) or found[-1])
    os.kill(found[-1], signal.SIGKILL)
    held = [json.loads(lease.read_bytes())["pid"] for lease in (cache.cache / "leases").rglob("view*")]
    assert found[-1] in held, "the shard was done before the kill"
    return found[-1]


@pytest.mark.parametrize("own_cluster", [False, True])
def test_worker_killed_in_mid_shard_is_made_up_for_by_others(start, dask, address, cache, extracted, own_cluster):
    where = ("--workers", 2) if own_cluster else ("--scheduler", f"tcp://{address}")
    if not own_cluster:
        scheduler_at(dask, address)
        workers_at(dask, address, 2)
    running = start("first", "extract", *where)
    kept = {}
    for _ in range(2):
        kill_in_mid_shard(running, cache)
        kept |= cache.receipts
    running.succeeded()
    assert kept.items() <= cache.receipts.items()
    assert cache.tokens == extracted.tokens
    cache.require_sound()
    assert cache.left_over == []


def test_scheduler_killed_is_one_line_and_the_next_run_completes(start, dask, address, cache, extracted):
    scheduler = scheduler_at(dask, address)
    workers_at(dask, address, 1)
    running = start("first", "extract", "--scheduler", f"tcp://{address}")
    running.until(lambda: cache.receipts)
    scheduler.kill()
    code, said = running.ended()
    assert code == 1
    assert "Traceback" not in said
    assert re.match("ClusterError: .* give the command again", said.strip().splitlines()[-1]), said
    kept = cache.receipts
    assert len(kept) < len(extracted.receipts)
    start("again", "extract").succeeded()
    assert kept.items() <= cache.receipts.items()
    assert cache.tokens == extracted.tokens
    cache.require_sound()
    assert cache.left_over == []
