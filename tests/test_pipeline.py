"""All four commands on 24 small clips, twice; the second time nothing is written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from karmma.data.sample import write_sample

pytestmark = pytest.mark.slow  # commands in processes of their own; tests/test_cli_flags.py gives them within one
QUICK = ("--epochs", "2", "--set", "teacher.threads=1", "--set", "student.threads=1")
COMMANDS = (("extract",), ("train-teacher", "--cache", "./cache", *QUICK), ("distill", *QUICK), ("evaluate",))


def karmma(folder: Path, *args: str) -> subprocess.CompletedProcess:
    """Run the command as a user does, in a process of its own."""
    command = [sys.executable, "-c", "from karmma.cli import main; main()", *args]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file below a folder."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which all four commands have run once on 24 clips of the sample data."""
    folder = tmp_path_factory.mktemp("home")
    write_sample(folder / "karmma-sample", n_clips=24)
    for command in COMMANDS:
        done = karmma(folder, *command)
        assert done.returncode == 0, done.stderr
    return folder


def test_every_stage_leaves_its_files(home):
    (teacher,) = home.glob("runs/teacher-*")
    (student,) = home.glob("runs/student-*")
    names = {"config.json", "result.json", "metrics.jsonl", "best.safetensors", "last.safetensors"}
    assert names <= {path.name for path in teacher.iterdir()}
    assert names <= {path.name for path in student.iterdir()}
    table = (student / "evaluation" / "test.csv").read_text().splitlines()
    assert table[0].startswith("group,subset,n_clips,n_complete,verb,noun,action,verb_low,")
    assert len([line for line in table if line.startswith("all,")]) == 15
    assert table[1].startswith("all,V+F+A+D,6,")


def test_second_time_writes_nothing_and_says_so(home):
    before = files(home)
    for command in COMMANDS:
        done = karmma(home, *command)
        assert done.returncode == 0, done.stderr
        assert "Nothing to do" in done.stderr
    assert files(home) == before


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_command_with_nothing_to_do_imports_neither_torch_nor_timm(home, command):
    code = "import sys; from karmma.cli import app; app(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=home, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "karmma.data.cache" in loaded
    assert not {"torch", "timm", "torchvision"} & loaded


def test_report_of_finished_runs_puts_teacher_beside_student(home):
    (teacher,), (student,) = home.glob("runs/teacher-*"), home.glob("runs/student-*")
    done = karmma(home, "report", "--efficiency", "--repeats", "0", "--into", "costs", str(teacher), str(student))
    assert done.returncode == 0, done.stderr
    found = json.loads((home / "costs" / "efficiency.json").read_text())
    assert [model["name"] for model in found] == [teacher.name, student.name]
    assert [model["trained"] for model in found] == [
        json.loads((run / "result.json").read_text())["parameters"] for run in (teacher, student)
    ]


def test_options_override_the_settings_and_are_saved_with_the_run(home):
    (student,) = home.glob("runs/student-*")
    config = json.loads((student / "config.json").read_text())
    assert config["settings"]["epochs"] == 2
    assert config["settings"]["modality_dropout"] == 0.5
    assert config["data"]["frames"] == 8
    assert len(config["teacher"]) == 16
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert {"loss", "ce", "kl", "lr", "clips_per_s", "waiting_share", "val", "masks_digest"} <= set(lines[0])
    table = (home / "karmma-sample" / "clips.csv").read_text()
    assert sum(lines[0]["masks"].values()) == table.count(",train,")


def test_one_modality_extracts_that_modality_only(home, tmp_path):
    done = karmma(home, "extract", "--modality", "flow", "--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir()] == ["flow"]


def test_other_settings_make_a_store_beside_the_old_one_and_training_names_the_field(home, tmp_path):
    cache = str(tmp_path / "cache")
    assert karmma(home, "extract", "--modality", "audio", "--cache", cache).returncode == 0
    done = karmma(home, "train-teacher", "--cache", cache, "--audio-mels", "40")
    assert done.returncode == 1
    assert "audio was extracted under other settings: input.audio_mels is 48, asked for 40" in done.stderr
    assert "Traceback" not in done.stderr


def test_student_of_one_modality_without_teacher_trains(home):
    options = ("--modality", "detections", "--teacher", "none", *QUICK)
    done = karmma(home, "distill", *options)
    assert done.returncode == 0, done.stderr
    assert "Modalities: D, teacher: none" in done.stderr


def test_cached_teacher_is_checked_against_a_live_one(home):
    before = files(home)
    done = karmma(home, "distill", "--check-teacher", "7")
    assert done.returncode == 0, done.stderr
    assert "7 clips replayed, largest difference" in done.stdout
    assert "14 of 14 first classes the same" in done.stdout
    assert files(home) == before


def shard_bytes(cache: Path) -> dict[str, bytes]:
    """Return the bytes of every shard and state chunk of a cache."""
    files = (path for path in cache.glob("tokens/**/c/**/*") if path.is_file())
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


@pytest.mark.parametrize("n_receipts", [1, 5])
def test_extract_killed_at_any_shard_and_run_again_gives_the_bytes_of_one_clean_run(home, tmp_path, n_receipts):
    def options(name):
        return ("extract", "--cache", str(tmp_path / name), "--shard-rows", "4", "--batch-size", "2")

    assert karmma(home, *options("clean")).returncode == 0
    code = "from karmma.cli import main; main()"
    killed = subprocess.Popen([sys.executable, "-c", code, *options("killed")], cwd=home, stderr=subprocess.DEVNULL)
    receipts = tmp_path / "killed" / "receipts" / "tokens"
    give_up = time.monotonic() + 120
    while len(list(receipts.glob("*/*/view0/*.json"))) < n_receipts and killed.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in receipts.glob("*/*/view0/*.json")}
    assert n_receipts <= len(kept) < 24
    done = karmma(home, *options("killed"))
    assert done.returncode == 0, done.stderr
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "clean")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_clip_that_cannot_be_read_is_named_and_blocks_until_it_is_allowed(home, tmp_path):
    sample = home / "karmma-sample"
    text = (sample / "clips.csv").read_text().replace("boxes/", f"{sample}/boxes/")
    text = text.replace("videos/clip_0001.mp4", "broken.mp4").replace("videos/", f"{sample}/videos/")
    (tmp_path / "clips.csv").write_text(text)
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    modalities = 'modalities = ["audio", "detections"]\n'
    (tmp_path / "karmma.toml").write_text(f'preset = "tiny"\n[data]\ntable = "clips.csv"\n{modalities}')
    done = karmma(tmp_path, "extract")
    assert done.returncode == 3
    assert "failed: audio of clip_0001: " in done.stderr
    for command in (("train-teacher", *QUICK), ("distill", *QUICK)):
        blocked = karmma(tmp_path, *command)
        assert blocked.returncode == 1
        assert "clip_0001" in blocked.stderr or "no teacher here" in blocked.stderr
        allowed = karmma(tmp_path, *command, "--allow-failures", "1")
        assert allowed.returncode == 0, allowed.stderr


def test_interrupted_command_ends_with_130_and_says_how_to_go_on(home, tmp_path):
    code = "from karmma.cli import main; main()"
    command = [sys.executable, "-c", code, "extract", "--cache", str(tmp_path / "cache"), "--shard-rows", "1"]
    running = subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 120
    while not list((tmp_path / "cache").glob("receipts/tokens/*/*/view0/*.json")):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Interrupted." in said
    assert "Traceback" not in said
