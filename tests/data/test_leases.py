"""Leases between real processes: one owner at a time, the dead make room, and whoever was given up finds out."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from karmma.data import leases as leases_module
from karmma.data.errors import CacheError
from karmma.data.leases import Leases
from karmma.data.publish import create

ELSEWHERE = "0123abcd"
N_RACERS = 8
# Does what it is told, line by line, with the lease "x" of the folder named.
OWNER = """
import sys
from pathlib import Path
from karmma.data.leases import Leases
with Leases(Path(sys.argv[1]), beat_s=0.05) as leases:
    print(leases.take("x"), flush=True)
    for line in sys.stdin:
        print(eval(line), flush=True)
"""
# Takes every lease that it can get and keeps all of them to the end.
RACER = """
import sys
from pathlib import Path
from karmma.data.leases import Leases
with Leases(Path(sys.argv[1])) as leases:
    print("ready", flush=True)
    input()
    print(*[name for name in sys.argv[2:] if leases.take(name)], flush=True)
    input()
"""
# Waits for its turn at every lease, and ends with an error where it is not alone.
GUEST = """
import os, sys
from pathlib import Path
from karmma.data import leases as module
module.POLL_S = 0.0005
with module.Leases(Path(sys.argv[1])) as leases:
    print("ready", flush=True)
    input()
    for name in sys.argv[2:]:
        with leases.waiting_for(name):
            os.mkdir(leases.folder.parent / name)
            assert leases.is_held(name)
            os.rmdir(leases.folder.parent / name)
print("was alone", flush=True)
input()
"""


@contextmanager
def running(code: str, *args: str | Path, n: int = 1):
    """Run `n` processes at once, each as far as its first line of output; they end with the block."""
    command = [sys.executable, "-c", code, *map(str, args)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(n)]
    try:
        assert {process.stdout.readline() for process in processes} <= {"ready\n", "True\n"}
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def say(text: str, *processes: subprocess.Popen):
    for process in processes:
        process.stdin.write(text + "\n")
        process.stdin.flush()


def asked(process: subprocess.Popen, question: str) -> str:
    say(question, process)
    return process.stdout.readline().strip()


def leave(folder: Path, *names: str, **changes: object):
    """Leave leases as an owner that has ended without giving them back does."""
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    with Leases(folder.parent / "template") as template:
        assert template.take("x")
        about = json.loads((folder.parent / "template" / "x.0").read_bytes())
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.0").write_text(json.dumps(about | {"pid": ended.pid} | changes))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "leases"


@pytest.mark.parametrize("is_left", [False, True], ids=["free", "left by a dead owner"])
def test_of_eight_processes_that_race_for_a_lease_exactly_one_gets_it(folder, is_left):
    names = [f"view0-{number}" for number in range(40)]
    if is_left:
        leave(folder, *names)
    with running(RACER, folder, *names, n=N_RACERS) as racers:
        say("go", *racers)
        assert sorted(name for racer in racers for name in racer.stdout.readline().split()) == sorted(names)
        for racer in racers:
            racer.communicate("end\n")
    assert files(folder) == []


def test_eight_processes_that_wait_for_a_dead_owners_lease_hold_it_one_after_another(folder):
    names = [f"planner{number}" for number in range(40)]
    leave(folder, *names)
    with running(GUEST, folder, *names, n=N_RACERS) as guests:
        say("go", *guests)
        assert [guest.stdout.readline() for guest in guests] == ["was alone\n"] * N_RACERS


@pytest.mark.parametrize("was_free", [False, True])
def test_process_that_slept_before_it_took_does_not_take_from_the_owner_since(folder, monkeypatch, was_free):
    """It saw a dead owner, or none; before it could act the lease went through other hands."""
    with Leases(folder) as sleeper, Leases(folder) as first, Leases(folder) as owner:

        def late(path, data):
            monkeypatch.setattr(leases_module, "create", create)
            if was_free:
                leave(folder, "x")
            else:
                assert first.take("x")
                first.give_back("x")
            assert owner.take("x")
            try:
                return create(path, data)
            finally:
                assert owner.is_held("x")  # though the sleeper's file may stand by now

        if not was_free:
            leave(folder, "x")
        monkeypatch.setattr(leases_module, "create", late)
        assert not sleeper.take("x")
        assert owner.is_held("x")
        assert not sleeper.is_held("x")
    assert files(folder) == []


def test_number_of_a_held_lease_rises_until_it_is_given_back(folder):
    with Leases(folder, beat_s=0.02) as leases:
        assert leases.take("audio/x/view0-1")
        beats = {json.loads((folder / "audio/x/view0-1.0").read_bytes())["beat"]}
        give_up = time.monotonic() + 10
        while len(beats) < 4 and time.monotonic() < give_up:
            time.sleep(0.01)
            beats.add(json.loads((folder / "audio/x/view0-1.0").read_bytes())["beat"])
        assert len(beats) == 4
        leases.give_back("audio/x/view0-1")
        time.sleep(0.06)
        assert files(folder) == []


def test_lease_of_a_killed_process_of_this_machine_is_taken_over_at_once(folder):
    with running(OWNER, folder) as (owner,), Leases(folder) as leases:
        assert not leases.take("x")
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert leases.take("x")
        assert leases.is_held("x")
    assert files(folder) == []


def test_lease_of_another_machine_is_taken_over_only_after_it_stood_still(folder):
    leave(folder, "x", machine=ELSEWHERE)
    with Leases(folder, lease_s=0.4) as leases:
        start = time.monotonic()
        while not leases.take("x"):
            time.sleep(0.01)
        assert time.monotonic() - start >= 0.4
        assert files(folder) == ["x.1"]


def test_lease_of_another_machine_is_left_alone_while_its_number_moves(folder):
    with Leases(folder, lease_s=0.3) as leases:
        for beat in range(12):
            leave(folder, "x", machine=ELSEWHERE, beat=beat)
            assert not leases.take("x")
            time.sleep(0.05)


def test_owner_on_another_machine_keeps_its_lease_by_its_heart_beat_alone(folder, monkeypatch):
    monkeypatch.setattr(leases_module, "MACHINE", ELSEWHERE)
    with running(OWNER, folder) as (owner,), Leases(folder, lease_s=1.0) as leases:
        start = time.monotonic()
        while time.monotonic() - start < 1.5:
            assert not leases.take("x")
            time.sleep(0.05)
        owner.send_signal(signal.SIGKILL)
        start = time.monotonic()
        while not leases.take("x"):
            time.sleep(0.05)
        assert time.monotonic() - start > 0.5


def test_lease_taken_again_by_its_owner_is_not_taken_for_one_at_rest(folder):
    with Leases(folder, beat_s=10) as owner, Leases(folder, lease_s=0.1) as other:
        assert owner.take("x")
        assert not other.take("x")
        owner.give_back("x")
        time.sleep(0.15)  # the other one was busy with its own shards
        assert owner.take("x")
        assert not other.take("x")


def test_owner_that_was_stopped_for_too_long_finds_out_and_leaves_the_new_owners_lease(folder):
    with running(OWNER, folder) as (owner,), Leases(folder, lease_s=0.3) as leases:
        assert asked(owner, "leases.is_held('x')") == "True"
        owner.send_signal(signal.SIGSTOP)
        while not leases.take("x"):
            time.sleep(0.02)
        leases.give_back("x")
        assert leases.take("x")  # under the name of the file that the first owner had
        owner.send_signal(signal.SIGCONT)
        assert asked(owner, "leases.is_held('x')") == "False"
        assert asked(owner, "leases.give_back('x')") == "None"
        owner.communicate()
        assert leases.is_held("x")
        assert len(files(folder)) == 1


def test_waiting_for_a_lease_ends_when_it_is_given_back(folder):
    with running(OWNER, folder) as (owner,), Leases(folder) as leases:
        say("[__import__('time').sleep(0.4), leases.give_back('x')]", owner)
        start = time.monotonic()
        with leases.waiting_for("x"):
            assert time.monotonic() - start > 0.2
            assert leases.is_held("x")
        assert not leases.is_held("x")
    assert files(folder) == []


def test_lease_is_not_taken_twice_and_names_that_begin_alike_are_apart(folder):
    with Leases(folder) as leases, Leases(folder) as other:
        assert leases.take("a/view0-1")
        assert not leases.take("a/view0-1")
        assert other.take("a/view0-10")
        assert other.take("b/view0-1")
        assert not other.take("a/view0-1")
    assert files(folder) == []


HALF = [b"", b"{", b'{"owner": "x", "machine": "', b"\0" * 80, b"nonsense}", b"\xff\xfe}", b"[]", b'{"machine": "%s"}']


@pytest.mark.parametrize("text", HALF, ids=lambda text: repr(text)[:20])
def test_lease_that_was_not_written_whole_is_taken_over_after_a_while(folder, text):
    folder.mkdir()
    (folder / "x.0").write_bytes(text.replace(b"%s", leases_module.MACHINE.encode()))
    with Leases(folder, lease_s=0.1) as leases:
        assert not leases.take("x")  # its owner may be about to write it
        time.sleep(0.15)
        assert leases.take("x")
    assert files(folder) == []


def test_folder_that_cannot_be_made_is_one_line_and_not_a_wait_without_end(tmp_path):
    (tmp_path / "leases").write_text("a file where the folder should be")
    with Leases(tmp_path / "leases") as leases:
        for name in ("x", "audio/x"):
            with pytest.raises(CacheError, match=r"leases/.*x\.0: cannot be written: Not a directory"):
                leases.take(name)


def test_disk_that_becomes_read_only_does_not_stop_leases_from_being_let_go(folder, monkeypatch):
    def refused(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched, Leases(folder) as leases:
        assert leases.take("x")
        patched.setattr(Path, "unlink", refused)
        leases.give_back("x")
        assert not leases.is_held("x")


def test_file_system_without_hard_links_grants_a_lease_once_too(folder, monkeypatch):
    def refused(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with Leases(folder) as leases, Leases(folder) as other:
        assert leases.take("x")
        assert not other.take("x")
        assert leases.is_held("x")
    assert files(folder) == []
