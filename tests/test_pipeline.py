"""All four commands on 24 small clips, twice; the second time nothing is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from karmma.data.sample import write_sample

QUICK = ("--epochs", "2", "--set", "teacher.threads=1", "--set", "student.threads=1")
COMMANDS = (("extract",), ("train-teacher", "--cache", "./cache", *QUICK), ("distill", *QUICK), ("evaluate",))


def karmma(folder: Path, *args: str) -> subprocess.CompletedProcess:
    """Run the command as a user does, in a process of its own."""
    command = [sys.executable, "-c", "from karmma.cli import main; main()", *args]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file below a folder."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != "planner.lock"]
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
    assert (student / "evaluation" / "test.html").read_text().count("<svg") == 2
    table = (student / "evaluation" / "test.csv").read_text().splitlines()
    assert table[0] == "subset,n_clips,n_complete,verb,noun,action,verb_low,noun_low,action_low"
    assert len(table) == 1 + 15
    assert table[1].startswith("V+F+A+D,6,")


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


def test_options_override_the_settings_and_are_saved_with_the_run(home):
    import json

    (student,) = home.glob("runs/student-*")
    config = json.loads((student / "config.json").read_text())
    assert config["settings"]["epochs"] == 2
    assert config["settings"]["modality_dropout"] == 0.5
    assert config["data"]["frames"] == 8
    assert len(config["teacher"]) == 16
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert {"loss", "ce", "kl", "lr", "clips_per_s", "waiting_share", "val"} <= set(lines[0])


def test_one_modality_extracts_that_modality_only(home, tmp_path):
    done = karmma(home, "extract", "--modality", "flow", "--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir()] == ["flow"]


def test_other_settings_make_a_store_beside_the_old_one_and_training_names_the_field(home, tmp_path):
    cache = str(tmp_path / "cache")
    assert karmma(home, "extract", "--modality", "audio", "--cache", cache).returncode == 0
    done = karmma(home, "train-teacher", "--cache", cache, "--audio-hop", "120")
    assert done.returncode == 1
    assert "audio was extracted under other settings: input.audio_hop is 128, asked for 120" in done.stderr
    assert "Traceback" not in done.stderr


def test_student_of_one_modality_without_teacher_trains(home):
    options = ("--modality", "detections", "--teacher", "none", *QUICK)
    done = karmma(home, "distill", *options)
    assert done.returncode == 0, done.stderr
    assert "Modalities: D, teacher: none" in done.stderr
