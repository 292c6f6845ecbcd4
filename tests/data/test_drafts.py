"""Shards in the making: what is kept is checked, what float16 cannot hold is refused, and the receipt comes last."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from karmma.data.cache import Cache
from karmma.data.config import digest
from karmma.data.drafts import ShardDraft, open_store
from karmma.data.errors import CacheError
from karmma.data.leases import Leases
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.plan import ShardTask
from karmma.data.publish import MACHINE, publish_folder, sweep
from karmma.data.stores import TokenStore
from karmma.data.verify import verify

K, WIDTH = 3, 5
IDENTITY = {"theta": K}
KEY = ("audio", digest(IDENTITY))
# Carries out a step in a forked process that is killed at its n-th call to the file system, for n = 0, 1, 2, ..., or
# in the midst of writing the first file that is larger than n times 100 bytes.
KILLED = """
import os, resource, shutil, signal, sys
sys.path.insert(0, sys.argv[3])
import {module} as test
folder, step = test.Path(sys.argv[1]), getattr(test, sys.argv[2])
shutil.copytree(folder / "before", folder / "whole")
step(folder / "whole")  # what is loaded at first use is loaded now
def deadly(call, n, calls=[]):
    def counted(*args, **options):
        calls.append(call)
        if len(calls) > n:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return counted
def prepare(way, n):
    if way == "size":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 * n, 100 * n))
    for name in ("fsync", "replace", "unlink", "link", "mkdir", "rmdir") if way == "call" else ():
        setattr(os, name, deadly(getattr(os, name), n))
for way in ("call", "size"):
    n, ended = 0, -1
    while ended != 0:
        shutil.copytree(folder / "before", folder / f"killed-{{way}}-{{n}}")
        pid = os.fork()
        if not pid:
            prepare(way, n)
            step(folder / f"killed-{{way}}-{{n}}")
            os._exit(0)
        ended = os.waitpid(pid, 0)[1]
        assert ended in (0, signal.SIGKILL, signal.SIGXFSZ), ended
        n += 1
"""


def tokens(row: int) -> np.ndarray:
    return np.arange(K * WIDTH, dtype=np.float32).reshape(K, WIDTH) / 7 + row


def task(n_rows: int, shard: int, changed: tuple[int, ...] = (), retry: bool = False) -> ShardTask:
    """Return the task of a shard of 4 clips when the table has `n_rows`, some of them with new times."""
    rows = range(4 * shard, min(4 * shard + 4, n_rows))
    return ShardTask(*KEY, 0, shard, 4 * shard, tuple(f"{row + 100 * (row in changed):08x}" for row in rows), retry)


def make(cache: Cache, wanted: ShardTask, **odd: object) -> list[int]:
    """Make a shard; rows named in `odd` (r4=...) hold what is given there.  Returns the rows that were due."""
    draft = ShardDraft(cache, TokenStore.open(cache.tokens_path(*KEY)), wanted)
    rows = [wanted.first_row + int(at) for at in np.flatnonzero(draft.due)]
    for row in rows:
        draft.put(row - wanted.first_row, PRESENT, odd.get(f"r{row}", tokens(row)), f"clip{row}")
    draft.publish({})
    return rows


def add_rows(folder: Path, n_rows: int = 8):
    ids = [f"clip{row}" for row in range(n_rows)]
    Cache(folder).add_rows(ids, ids, ["{}"] * n_rows)


def grow(folder: Path, n_rows: int = 8) -> TokenStore:
    return open_store(Cache(folder), *KEY, IDENTITY, (n_rows, 1, K, WIDTH), 4)


def extend(folder: Path):
    make(Cache(folder), task(8, 1))


@pytest.fixture
def cache(tmp_path):
    """Six clips in shards of 4."""
    add_rows(tmp_path / "cache", 6), grow(tmp_path / "cache", 6)
    made = Cache(tmp_path / "cache")
    make(made, task(6, 0)), make(made, task(6, 1))
    return made


def written(cache: Cache) -> dict[str, bytes]:
    files = [path for path in (cache.path / "tokens").rglob("*") if path.is_file()]
    return {str(path.relative_to(cache.path)): path.read_bytes() for path in files}


def rows_of(cache: Cache, *rows: int) -> np.ndarray:
    return TokenStore.open(cache.tokens_path(*KEY)).read(np.array(rows), 0)


def test_rows_that_are_there_are_kept_and_only_new_ones_made(cache):
    before = rows_of(cache, 4, 5)
    add_rows(cache.path), grow(cache.path)
    assert make(cache, task(8, 1)) == [6, 7]
    assert np.array_equal(rows_of(cache, 4, 5), before)
    assert np.array_equal(rows_of(cache, 6, 7), [tokens(6).astype(np.float16), tokens(7).astype(np.float16)])
    assert make(cache, task(8, 1, changed=(5,)), r5=tokens(50)) == [5]
    assert np.array_equal(rows_of(cache, 4, 5), [before[0], tokens(50).astype(np.float16)])


def test_rows_that_another_process_has_added_behind_those_asked_for_stay(cache):
    add_rows(cache.path), grow(cache.path), make(cache, task(8, 1))
    before = written(cache)
    assert make(cache, task(6, 1, changed=(4,))) == [4]
    assert make(cache, task(6, 1)) == [4]
    assert written(cache) == before


@pytest.mark.parametrize("file", ["tokens/c/1/0/0/0", "state/c/1/0"])
def test_shard_with_a_flipped_bit_is_refused_before_its_rows_are_copied(cache, file):
    add_rows(cache.path), grow(cache.path)
    path = cache.tokens_path(*KEY) / file
    data = bytearray(path.read_bytes())
    data[1] ^= 4
    path.write_bytes(data)
    before = written(cache)
    with pytest.raises(CacheError, match=r"shard 1 of view 0 .* damaged. Run karmma cache verify --drop, then karmma"):
        make(cache, task(8, 1))
    assert written(cache) == before


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1e6, "its tokens reach 1e+06, which float16 cannot hold"),
        (-65520, "its tokens reach 6.55e+04, which float16"),
        (np.nan, "1 of its 15 token values are not finite"),
        (np.inf, "1 of its 15 token values are not finite"),
    ],
)
def test_tokens_that_cannot_be_held_make_their_clip_failed_by_name_and_no_other(cache, value, said):
    add_rows(cache.path), grow(cache.path)
    odd = tokens(6)
    odd[1, 2] = value
    make(cache, task(8, 1), r6=odd, r7=np.full((K, WIDTH), 65504, np.float32))
    (failure,) = cache.receipt(*KEY, 0, 1)["failures"]
    assert (failure["row"], failure["clip_id"]) == (6, "clip6")
    assert failure["reason"].startswith(said)
    assert cache.receipt(*KEY, 0, 1)["counts"] == {"present": 3, "failed": 1}
    store = TokenStore.open(cache.tokens_path(*KEY))
    assert store.state(np.arange(4, 8), 0).tolist() == [PRESENT, PRESENT, FAILED, PRESENT]
    assert np.isnan(rows_of(cache, 6)).all()
    assert (rows_of(cache, 7) == 65504).all()
    assert list(verify(cache)) == []


def test_retry_makes_failed_rows_alone_and_forgets_their_reasons(cache):
    add_rows(cache.path), grow(cache.path)
    make(cache, task(8, 1), r6=np.full((K, WIDTH), np.nan), r7=np.full((K, WIDTH), np.inf))
    assert make(cache, task(8, 1)) == []
    kept = rows_of(cache, 4, 5)
    assert make(cache, task(8, 1, retry=True), r7=np.full((K, WIDTH), np.inf)) == [6, 7]
    assert [failure["clip_id"] for failure in cache.receipt(*KEY, 0, 1)["failures"]] == ["clip7"]
    assert make(cache, task(8, 1, retry=True)) == [7]
    assert cache.receipt(*KEY, 0, 1)["failures"] == []
    assert np.array_equal(rows_of(cache, 4, 5), kept)


def test_absent_and_failed_rows_hold_nan_whatever_the_backbone_gave(cache):
    draft = ShardDraft(cache, TokenStore.open(cache.tokens_path(*KEY)), task(6, 1, changed=(4, 5)))
    draft.put(0, ABSENT, tokens(4), "clip4")
    draft.put(1, FAILED, tokens(5), "clip5", "no such file")
    draft.publish({})
    assert np.isnan(rows_of(cache, 4, 5)).all()
    assert list(verify(cache)) == []


@pytest.mark.parametrize("step", ["extend", *(pytest.param(s, marks=pytest.mark.slow) for s in ("grow", "add_rows"))])
def test_killed_at_any_call_and_done_again_gives_the_same_bytes(cache, tmp_path, step):
    if step != "add_rows":
        add_rows(cache.path)
    if step == "extend":
        grow(cache.path)
    shutil.copytree(cache.path, tmp_path / "before")
    old = {shard: cache.receipt(*KEY, 0, shard) for shard in (0, 1)}
    code = KILLED.format(module=Path(__file__).stem)
    subprocess.run([sys.executable, "-c", code, tmp_path, step, Path(__file__).parent], check=True)
    killed, whole = [Cache(folder) for folder in tmp_path.glob("killed*")], Cache(tmp_path / "whole")
    for one in killed:
        assert list(verify(one)) == [], one.path
        found = one.receipt(*KEY, 0, 1)
        assert found in (None, old[1], whole.receipt(*KEY, 0, 1)), one.path
        add_rows(one.path), grow(one.path), extend(one.path)
        sweep(one.path)
    add_rows(whole.path), grow(whole.path), extend(whole.path)
    assert len(killed) > 12
    for one in killed:
        assert written(one) == written(whole), one.path
        assert Cache(one.path).receipt(*KEY, 0, 0) == old[0]
        assert Cache(one.path).clip_ids == [f"clip{row}" for row in range(8)]
        assert not list(one.path.rglob("*.tmp"))


def test_receipts_may_be_dropped_and_written_while_others_read_them(cache):
    receipt, ended = cache.receipt(*KEY, 0, 1), threading.Event()

    def supersede():
        while not ended.is_set():
            cache.drop_receipt(*KEY, 0, 1)
            cache.write_receipt(*KEY, 0, 1, receipt)

    thread = threading.Thread(target=supersede)
    thread.start()
    try:
        assert all(0 in cache.valid_receipts(*KEY, 0) for _ in range(400))
    finally:
        ended.set()
        thread.join()


def test_receipt_that_cannot_be_dropped_is_one_line_and_leaves_the_shard_as_it_is(cache, monkeypatch):
    def refused(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    before = written(cache)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(CacheError, match=r"view0/1\.json: .*Read-only file system"):
        make(cache, task(6, 1, changed=(4,)))
    monkeypatch.undo()
    assert written(cache) == before
    assert list(verify(cache)) == []


def test_several_processes_sweep_at_once_while_stores_are_made(tmp_path):
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    for number in range(100):
        left = tmp_path / "tokens" / f".{number}.zarr.{MACHINE}-{ended.pid}.tmp" / "c" / "0"
        left.mkdir(parents=True)
        (left / "0").write_bytes(b"half")
    code = "import sys; from pathlib import Path; from karmma.data.publish import sweep; print('ready', flush=True); "
    code += "input(); [sweep(Path(sys.argv[1])) for _ in range(30)]"
    command = [sys.executable, "-c", code, tmp_path]
    sweepers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        assert {sweeper.stdout.readline() for sweeper in sweepers} == {"ready\n"}
        for sweeper in sweepers:
            sweeper.stdin.write("go\n")
            sweeper.stdin.flush()
        while any(sweeper.poll() is None for sweeper in sweepers):
            publish_folder(tmp_path / "tokens" / "x.zarr", lambda folder: (folder / "tokens" / "c").mkdir(parents=True))
        assert [sweeper.returncode for sweeper in sweepers] == [0, 0, 0]
    finally:
        for sweeper in sweepers:
            sweeper.kill()
            sweeper.communicate()
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["x.zarr"]


def test_planner_that_was_stopped_for_too_long_keeps_what_others_have_added(tmp_path, monkeypatch):
    code = """
import os, signal, sys
from karmma.data.cache import Cache
taken, calls = Cache._taken, []
def slow(*args):
    calls.append(args)
    if len(calls) == 2:  # the rows have been read under the lease
        os.kill(os.getpid(), signal.SIGSTOP)
    return taken(*args)
Cache._taken = slow
Cache(sys.argv[1]).add_rows(["a"], ["from a"], ["{}"])
"""
    planner = subprocess.Popen([sys.executable, "-c", code, tmp_path / "cache"])
    try:
        assert os.WIFSTOPPED(os.waitpid(planner.pid, os.WUNTRACED)[1])
        monkeypatch.setattr(Leases.__init__, "__defaults__", (0.05, 0.3))
        Cache(tmp_path / "cache").add_rows(["b"], ["from b"], ["{}"])
        planner.send_signal(signal.SIGCONT)
        assert planner.wait() == 0
    finally:
        planner.kill()
        planner.wait()
    assert sorted(Cache.open(tmp_path / "cache").clip_ids) == ["a", "b"]
