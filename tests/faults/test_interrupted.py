"""Ctrl-C at any instant: commands end soon, in one line that says how to go on, and leave no process behind."""

import os
import random
import signal
import statistics
import time

import psutil
import pytest

SOON_S = 2.0
INSTANTS = 6
# Fifteen clips are extracted before anybody could press a key.
SLOWLY = """
import time
os.close(os.open(folder + "/begun", os.O_CREAT))
put_at_once = ShardDraft.put
def put_slowly(self, *given):
    time.sleep(0.5)
    put_at_once(self, *given)
ShardDraft.put = put_slowly
"""
COMMANDS = {
    "extract": ("--shard-rows", 1),
    "extract --workers 2": ("--shard-rows", 1),
    "train-teacher": ("--epochs", 2000),
    "distill": ("--epochs", 500, "--teacher", "none"),
    "sweep max_lr=1e-4..1e-2,log": ("--epochs", 2000, "--workers", 2),
}


def interrupted(running, after_s):
    """Interrupt a command as a terminal does; return exit code, seconds that it took, and what it said."""
    running.until((running.folder / "begun").exists)
    time.sleep(after_s)
    readers = psutil.Process(running.pid).children(recursive=True)
    start = time.monotonic()
    os.killpg(running.pid, signal.SIGINT)
    code, said = running.ended()
    took = time.monotonic() - start
    assert psutil.wait_procs(readers, timeout=5)[1] == []
    return code, took, said


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_ends_soon_in_one_line_that_says_how_to_go_on(start, cache, tmp_path, command):
    if not command.startswith("extract"):
        start("before", "extract").succeeded()
    name = command.split()[0]
    instants, took = random.Random(7), []
    for at in range(INSTANTS):
        runs = () if name == "extract" else ("--runs", tmp_path / f"runs{at}")
        place = ("--cache", tmp_path / f"cache{at}") if name == "extract" else ()
        running = start(f"{name}{at}", command, *COMMANDS[command], *runs, *place, before=SLOWLY)
        code, seconds, said = interrupted(running, instants.uniform(0.3, 4.0))
        took.append(seconds)
        assert code == 130, said
        last = said.strip().splitlines()[-1]
        assert last.startswith(f"Interrupted. What was finished is kept. To go on: karmma {name} ")
        assert last.endswith(" --resume") == (name in ("train-teacher", "distill"))
        assert "Traceback" not in said
    assert statistics.median(took) < SOON_S, took
