"""A student whose training was killed, interrupted, lost a reader, or ran on two ranks, against one left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from karmma.data.runs import RunFolder
from karmma.distill.stage import distill_student

pytestmark = pytest.mark.slow
SMALL = {"modalities", "frames", "size", "max_boxes", "audio_segment_s", "audio_hop", "audio_mels", "audio_steps"}
KARMMA = [str(Path(sys.executable).with_name("karmma"))]


@pytest.fixture
def config(config):
    """Two epochs of four steps, the last with fewer clips, in which the detections drop out most."""
    return config.model_copy(update={"missing": "B.5", "attention_dropout": 0.1, "device": "cpu"})


@pytest.fixture
def command(sample, data, config, tmp_path):
    """Return a function that gives the command line of the same training into some folder of runs."""
    sections = {
        "data": {"table": str(sample / "clips.csv"), **data.model_dump(mode="json", include=SMALL)},
        "student": config.model_dump(mode="json", exclude_none=True, exclude={"variant", "flow"}),
    }
    lines = []
    for name, values in sections.items():
        backbones = {key: value for key, value in values.items() if isinstance(value, dict)}
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items() if k not in backbones)]
        for key, value in backbones.items():
            lines += [f"[{name}.{key}]", *(f"{k} = {json.dumps(v)}" for k, v in value.items())]
    (tmp_path / "karmma.toml").write_text("\n".join(lines))
    return lambda runs, *options: [
        *(*KARMMA, "distill", "--config", str(tmp_path / "karmma.toml")),
        *("--runs", str(runs), "--cache", str(data.cache), *options),
    ]


def readers_of(pid):
    """Return the processes that a process has started and that read clips."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "karmma.data.reader"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def is_alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds=120.0):
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    return found


def test_student_killed_in_mid_epoch_and_resumed_ends_in_the_same_bytes(
    table, data, config, command, slowed, left, tmp_path
):
    plain = distill_student(table, data, config).run
    asked = command(tmp_path / "killed", "--save-minutes", "0")
    state = tmp_path / "killed" / plain.name / "state.safetensors"
    running = subprocess.Popen(asked, stderr=subprocess.DEVNULL, env=slowed)
    seen = set()
    wait_for(lambda: (state.exists() and seen.add(state.stat().st_mtime_ns)) or len(seen) >= 6)
    readers = readers_of(running.pid)
    running.send_signal(signal.SIGKILL)
    running.wait()
    wait_for(lambda: not any(map(is_alive, readers)), 20)
    assert not RunFolder(state.parent).is_finished
    refused = subprocess.run(asked, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "--resume" in refused.stderr
    done = subprocess.run([*asked, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert left(state.parent) == left(plain)
    assert not state.exists()


def test_ctrl_c_ends_training_at_once_and_leaves_no_reader(data, command, slowed, tmp_path):
    asked = command(tmp_path / "stopped", "--save-minutes", "0")
    running = subprocess.Popen(asked, stderr=subprocess.PIPE, text=True, env=slowed)
    wait_for(lambda: list((tmp_path / "stopped").glob("*/state.safetensors")))
    readers = readers_of(running.pid)
    assert readers
    start = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert time.monotonic() - start < 15
    assert running.returncode == 130
    assert "Interrupted." in said
    assert "Traceback" not in said
    assert not any(map(is_alive, readers))


def test_reader_that_is_killed_is_replaced_and_the_student_is_the_same(
    table, data, config, command, slowed, left, tmp_path
):
    plain = distill_student(table, data, config).run
    no_memory = ("--input-cache-mb", "0")
    running = subprocess.Popen(command(tmp_path / "shot", *no_memory), stderr=subprocess.PIPE, text=True, env=slowed)
    shots = [0.0]
    while running.poll() is None:
        readers = readers_of(running.pid)
        # Time to read a clip again between two shots: one that takes two readers down has failed.
        if readers and len(shots) < 3 and time.monotonic() - shots[-1] > 4:
            os.kill(readers[0], signal.SIGKILL)
            shots.append(time.monotonic())
        time.sleep(0.05)
    _, said = running.communicate()
    assert running.returncode == 0, said
    assert len(shots) > 1
    assert left(tmp_path / "shot" / plain.name) == left(plain)


def test_two_ranks_give_the_losses_of_one(table, data, config, command, tmp_path):
    """Batches of 5 clips do not divide by two, the last of an epoch is smaller, and dropout is at work."""
    plain = distill_student(table, data, config).run
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*ranks, *command(tmp_path / "two")], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    one, two = (RunFolder.open(folder / plain.name) for folder in (data.runs, tmp_path / "two"))
    for alone, together in zip(one.metrics(), two.metrics(), strict=True):
        assert together["masks_digest"] == alone["masks_digest"]
        for name in ("loss", "ce", "lr"):
            assert together[name] == pytest.approx(alone[name], abs=1e-5)
        for name, value in alone["val"].items():
            assert together["val"][name] == pytest.approx(value, abs=1e-5)
    assert done.stderr.count("Wrote") == 1
