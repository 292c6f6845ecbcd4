"""`karmma extract` killed at any instant, and side by side with others: the bytes of one clean run, nothing twice."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from karmma.data.cache import Cache
from karmma.data.sample import write_sample
from karmma.data.verify import verify

N_CLIPS, GIVE_UP_S = 15, 50
SETTINGS = """
preset = "tiny"
[data]
table = "all.csv"
heads = ["verb"]
modalities = ["audio", "detections"]
frames = 4
size = 32
audio_segment_s = 0.256
audio_mels = 24
audio_steps = 32
[extract]
theta = 7
batch_size = 2
shard_rows = 2
readers = 1
"""
# The command in a session of its own, which notes every row that it makes; torch was loaded before the fork.
COMMAND = """
import os, sys
from karmma import cli
from karmma.data.drafts import ShardDraft
os.setsid()
said = os.open(folder + "/said", os.O_WRONLY | os.O_CREAT)
os.dup2(said, 1), os.dup2(said, 2)
put, made = ShardDraft.put, os.open(folder + "/made", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def noted(self, at, *rest):
    os.write(made, f"{self.task.lease} {at}\\n".encode())
    put(self, at, *rest)
ShardDraft.put = noted
exec(before)
sys.argv = ["karmma", "extract", *options]
cli.main()
"""
GIVE_NOTHING_BACK = """
from karmma.data.leases import Leases
give_back = Leases.give_back
def killed(self, name):
    os.kill(os.getpid(), 9) if name != "planner" else give_back(self, name)
Leases.give_back = killed
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Fifteen clips, in a table of all and in one of the first seven."""
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=N_CLIPS)
    lines = (folder / "clips.csv").read_text().splitlines(keepends=True)
    (folder / "all.csv").write_text("".join(lines))
    (folder / "some.csv").write_text("".join(lines[:8]))
    (folder / "settings.toml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def forking():
    """The place where processes are forked from one that has loaded torch and runs no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pandas", "karmma.cli", "karmma.extract.engine"])
    return context


@pytest.fixture
def start(sample, forking, tmp_path):
    """Return a function that starts the command; whatever still runs at the end of the test is killed."""
    processes = []

    def begin(name: str, *options: str, before: str = ""):
        (tmp_path / name).mkdir()
        given = ("--config", str(sample / "settings.toml"), "--cache", str(tmp_path / "cache"), *options)
        told = {"folder": str(tmp_path / name), "options": given, "before": before}
        processes.append(forking.Process(target=exec, args=(COMMAND, told)))
        processes[-1].folder = tmp_path / name
        processes[-1].start()
        return processes[-1]

    yield begin
    for process in processes:
        kill(process)


def kill(process, alone: bool = False):
    """End a process by SIGKILL, with its readers, which must end by themselves where it is killed alone."""
    if process.is_alive():
        readers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for reader in [] if alone else readers:
            reader.kill()
        give_up = time.monotonic() + GIVE_UP_S
        while any(map(is_at_work, readers)):
            assert time.monotonic() < give_up
            time.sleep(0.01)
    process.join(GIVE_UP_S)


def is_at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # which remains where nobody collects orphans
    except psutil.NoSuchProcess:
        return False


def ended(process) -> tuple[int, str]:
    """Wait for a process; return its exit code and what it said."""
    process.join(GIVE_UP_S)
    return process.exitcode, (process.folder / "said").read_text()


def made(process) -> list[str]:
    """Return "lease place" of every row that a process has made so far."""
    file = process.folder / "made"
    return file.read_text().splitlines() if file.exists() else []


def until(is_so, process):
    """Wait until something is so, as long as a process runs."""
    give_up = time.monotonic() + GIVE_UP_S
    while not is_so() and process.is_alive():
        assert time.monotonic() < give_up
        time.sleep(0.002)


def contents(cache: Path) -> dict[str, bytes]:
    files = [path for path in (cache / "tokens").rglob("*") if path.is_file()]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def receipts(cache: Path) -> dict[Path, tuple[int, bytes]]:
    """Return time of change and content of all receipts of shards."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in cache.glob("receipts/tokens/*/*/view*/*.json")
    }


def leases_of(receipts: dict) -> set[str]:
    """Return the leases under which shards with these receipts were made."""
    return {f"{path.parts[-4]}/{path.parts[-3]}/view0-{path.stem}" for path in receipts}


def left_over(cache: Path) -> list[Path]:
    leases = [path for path in (cache / "leases").rglob("*") if path.is_file()]
    return [*leases, *cache.rglob("*.tmp")]


@pytest.fixture(scope="module")
def clean(sample, forking, tmp_path_factory):
    """The cache of one run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("clean")
    options = ("--config", str(sample / "settings.toml"), "--cache", str(folder / "cache"))
    process = forking.Process(target=exec, args=(COMMAND, {"folder": str(folder), "options": options, "before": ""}))
    process.folder = folder
    process.start()
    code, said = ended(process)
    assert code == 0, said
    assert len(made(process)) == 2 * N_CLIPS
    return folder / "cache"


def survive(start, clean: Path, cache: Path, waits, seed: int = 0) -> None:
    """Start the command again and again, kill it as each of `waits` ends, and let the last one finish."""
    for n, wait in enumerate([*waits, None]):
        if wait and len(receipts(cache)) == len(receipts(clean)):  # else the rest would be killed for nothing
            for receipt in random.Random(seed + n).sample(sorted(receipts(cache)), 9):
                receipt.unlink()
        kept = receipts(cache)
        process = start(f"run{n}")
        if wait is None:
            code, said = ended(process)
            assert code == 0, said
        else:
            wait(process)
            kill(process, alone=n % 2 == 1)
        assert {path: about for path, about in receipts(cache).items() if path in kept} == kept
        assert not leases_of(kept) & {row.split()[0] for row in made(process)}
        assert not cache.exists() or not list(verify(Cache(cache)))
    assert contents(cache) == contents(clean)
    assert Cache(cache).clip_ids == Cache(clean).clip_ids
    assert left_over(cache) == []


def test_killed_at_three_instants_and_run_again_gives_the_bytes_of_one_clean_run(start, clean, tmp_path):
    draw = random.Random(4)

    def wait_for(n_receipts: int):
        def wait(process):
            until(lambda: len(receipts(tmp_path / "cache")) >= n_receipts, process)
            time.sleep(draw.uniform(0, 0.1))

        return wait

    survive(start, clean, tmp_path / "cache", [wait_for(0), wait_for(1), wait_for(6)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_twenty_random_instants_gives_the_bytes_of_one_clean_run(start, clean, tmp_path, seed):
    draw = random.Random(seed)

    def wait(process):
        end = time.monotonic() + draw.uniform(0, 4)
        until(lambda: time.monotonic() > end, process)

    survive(start, clean, tmp_path / "cache", [wait] * 20, seed)


def test_lease_of_a_process_killed_after_the_last_receipt_does_not_stay(start, clean, tmp_path):
    cache = shutil.copytree(clean, tmp_path / "cache")
    sorted(receipts(cache))[-1].unlink()
    assert ended(start("killed", before=GIVE_NOTHING_BACK))[0] == -signal.SIGKILL
    assert receipts(cache).keys() == {cache / path.relative_to(clean) for path in receipts(clean)}
    assert left_over(cache) != []
    code, said = ended(start("again"))
    assert (code, "Nothing to do" in said) == (0, True), said
    assert left_over(cache) == []


def test_two_processes_at_once_make_every_row_once_and_the_bytes_of_one(start, clean, tmp_path):
    first = start("first")
    until(lambda: made(first), first)
    os.kill(first.pid, signal.SIGSTOP)  # until the second one is at work too
    second = start("second")
    until(lambda: made(second), second)
    os.kill(first.pid, signal.SIGCONT)
    ends = [ended(first), ended(second)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert len(made(first) + made(second)) == len({*made(first), *made(second)}) == 2 * N_CLIPS
    assert contents(tmp_path / "cache") == contents(clean)
    assert left_over(tmp_path / "cache") == []
    counts = [int(re.search(r"Extracted (\d+)", said)[1]) for _, said in ends]
    assert counts == [len(made(first)), len(made(second))]


def test_shards_of_a_process_that_is_killed_are_taken_over_by_the_one_beside_it(start, clean, tmp_path):
    first = start("first")
    until(lambda: receipts(tmp_path / "cache"), first)
    os.kill(first.pid, signal.SIGSTOP)
    kept, held = receipts(tmp_path / "cache"), left_over(tmp_path / "cache")
    assert held
    second = start("second")
    until(lambda: made(second), second)
    kill(first)
    code, said = ended(second)
    assert code == 0, said
    assert not leases_of(kept) & {row.split()[0] for row in made(second)}
    assert {path: about for path, about in receipts(tmp_path / "cache").items() if path in kept} == kept
    assert contents(tmp_path / "cache") == contents(clean)
    assert left_over(tmp_path / "cache") == []


@pytest.mark.parametrize("longer_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_with_tables_of_different_length_end_in_the_cache_of_the_longer(
    start, clean, sample, tmp_path, longer_first
):
    tables = [("--table", str(sample / name)) for name in ("some.csv", "all.csv")]
    first = start("first", *tables[longer_first])
    until(lambda: made(first), first)
    os.kill(first.pid, signal.SIGSTOP)
    second = start("second", *tables[not longer_first])
    time.sleep(0.5)
    os.kill(first.pid, signal.SIGCONT)
    ends = [ended(first), ended(second)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert contents(tmp_path / "cache") == contents(clean)
    assert Cache(tmp_path / "cache").clip_ids == Cache(clean).clip_ids
    assert list(verify(Cache(tmp_path / "cache"))) == []
    assert left_over(tmp_path / "cache") == []
