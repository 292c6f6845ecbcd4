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


# For workers: notes every row of tokens that they make.
NOTE_ROWS = """
import importlib.abc, os, sys
class Note(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "karmma.extract.engine":
            from karmma.data.drafts import ShardDraft
            put, made = ShardDraft.put, os.open(os.environ["MADE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            def noted(self, at, *rest):
                os.write(made, f"{os.getpid()} {self.task.first_row + at}\\n".encode())
                put(self, at, *rest)
            ShardDraft.put = noted
sys.meta_path.insert(0, Note())
"""


@pytest.fixture
def dask(tmp_path):
    """Return a function that starts a part of a Dask cluster; all of them end with the test."""
    parts = []
    (tmp_path / "path").mkdir()
    (tmp_path / "path/sitecustomize.py").write_text(NOTE_ROWS)
    path = f"{tmp_path / 'path'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path, "MADE": str(tmp_path / "made"), "OMP_NUM_THREADS": "1"}

    def begin(*words):
        how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
        parts.append(subprocess.Popen([DASK, *words], **how, cwd=tmp_path, start_new_session=True))
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


def test_four_workers_make_each_of_two_thousand_clips_once(start, dask, address, cache, sample, tmp_path):
    lines = (sample / "all.csv").read_text().splitlines()
    rows = [line.replace("clip_", f"{turn}-clip_", 1) for turn in range(134) for line in lines[1:]][:2000]
    rows = [row.replace("videos/", f"{sample}/videos/").replace("boxes/", f"{sample}/boxes/") for row in rows]
    (tmp_path / "many.csv").write_text("\n".join([lines[0], *rows]))
    scheduler_at(dask, address)
    workers_at(dask, address, 4)
    options = ("--table", tmp_path / "many.csv", "--modality", "detections", "--shard-rows", 10)
    start("all", "extract", "--scheduler", f"tcp://{address}", *options).succeeded()
    made = [line.split() for line in (tmp_path / "made").read_text().splitlines()]
    assert sorted(int(row) for _, row in made) == [*range(2000)]
    assert len({worker for worker, _ in made}) == 4
    cache.require_sound()
    assert cache.left_over == []
