"""A sensor of one's own: its features are imported under its own name, taught with, and left to the teacher."""

import json
import re

import h5py
import numpy as np
import pytest
from karmma.data.clips import read_clip_table
from karmma.data.errors import CacheError, ConfigError
from karmma.data.foreign import open_foreign
from karmma.data.modality import in_order, letters, subsets
from karmma.data.sample import write_sample

SETTINGS = """
preset = "tiny"
[data]
table = "sample/clips.csv"
heads = ["verb"]
modalities = ["audio", "own_imu"]
[teacher]
epochs = 2
threads = 1
[student]
epochs = 1
threads = 1
"""
N_CLIPS = 24


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of sample clips, and of features of all but one of them."""
    write_sample(tmp_path / "sample", n_clips=N_CLIPS)
    (tmp_path / "karmma.toml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_features(path, table, name="own_imu"):
    values = np.random.default_rng(0).normal(0, 1, (table.n_clips, 3, 5))
    values[4] = np.nan
    with h5py.File(path, "w") as file:
        file.create_dataset("clip_id", data=table.clip_ids.tolist(), dtype=h5py.string_dtype())
        file[f"tokens/{name}"] = values
    return path


def test_own_names_come_after_the_four_and_tables_call_them_without_the_prefix():
    assert in_order(["own_b", "audio", "own_a", "video"]) == ("video", "audio", "own_a", "own_b")
    assert [letters(subset) for subset in subsets(["own_imu", "video"])] == ["V+imu", "V", "imu"]


@pytest.mark.parametrize("name", ["imu", "own_", "own_IMU", "own_../x", "own_a/b", "own_a\n", "own_" + 33 * "a"])
def test_other_names_are_refused(name, here):
    with pytest.raises(ConfigError, match="Unknown modality"):
        in_order(["video", name])
    table = read_clip_table(here / "sample/clips.csv", ("verb",))
    with h5py.File(write_features(here / "x.h5", table, "audio"), "a") as file:
        file["tokens"][name.replace("/", "_-")] = file["tokens/audio"][:]
    with open_foreign(here / "x.h5", table) as foreign, pytest.raises(CacheError, match="called own_NAME"):
        _ = foreign.modalities


def test_whole_pipeline_takes_an_own_sensor_for_the_teacher_alone(here, give, caplog):
    def answer(*words):
        code, out, err = give(*words, "--json")
        assert code == 0, err
        return json.loads(out), err

    said, err = answer("extract")
    assert ({*said["counts"]}, "own_imu is not extracted but imported: karmma cache import" in err) == ({"audio"}, True)
    assert answer("train-teacher")[0]["modalities"] == ["audio"]
    assert "Left out own_imu: 24 of 24 clips are not imported" in caplog.text
    write_features(here / "imu.h5", read_clip_table(here / "sample/clips.csv", ("verb",)))
    taken = answer("cache", "import", "imu.h5")[0]["taken"]
    assert answer("train-teacher", "--seed", "1")[0]["modalities"] == ["audio", "own_imu"]
    (listed,) = (one for one in answer("cache", "info")[0]["stores"] if one["kind"] == "own_imu")
    assert (listed["name"], listed["n_current"]) == (taken["own_imu"], N_CLIPS)
    assert answer("cache", "verify")[0]["damage"] == []
    teacher = answer("train-teacher", "--seed", "1")[0]
    rows = answer("evaluate", teacher["run"], "--split", "val")[0]
    assert re.search(r'"A\+imu".*"A".*"imu"', json.dumps(rows))
    assert "predict" not in answer("report", teacher["run"], "--split", "val")[1]  # a teacher takes no files
    assert "Without own_imu: " in answer("report", "--efficiency", "--repeats", "0")[1]
    digest = re.search(r"logits/(\w+)\.zarr", teacher["logits"])[1]
    student = answer("distill", "--teacher", digest)[0]
    assert student["modalities"] == ["audio"]
    for more in (), ("--draws", "3"):  # the second time from what was kept
        answer("evaluate", student["run"], *more)
        assert json.loads((here / student["run"] / "evaluation/test.json").read_text())["label"] == "KARMMA_A"
    answer("report", student["run"])
    answer("check")
    answer("doctor", "--clips", "1")
    answer("doctor", "--plan")
    for words in ("cache", "adopt", taken["own_imu"]), ("cache", "adopt", taken["own_imu"], "--dry-run"):
        code, _, err = give(*words)
        assert (code, "were imported" in err.strip().splitlines()[-1]) == (1, True)


def test_where_nothing_is_read_from_files_every_command_says_what_to_do(here, give):
    asked = ("--set", "data.modalities=own_imu")
    for words in ("extract",), ("extract", "--dry-run"), ("report", "--efficiency"), ("distill", "--teacher", "none"):
        code, _, err = give(*words, *asked)
        assert (code, "only own_imu, which karmma cache import brings" in err) == (1, True), words
    write_features(here / "imu.h5", read_clip_table(here / "sample/clips.csv", ("verb",)))

    def found():
        code, out, err = give("doctor", "--clips", "1", "--json", *asked)
        assert code == 0, err
        return {one["check"]: one["verdict"] for one in json.loads(out)["findings"]}

    assert found()["own_imu"] == "WARN"
    assert give("cache", "import", "imu.h5")[0] == 0
    assert found()["own_imu"] == "PASS"
    assert give("train-teacher", *asked)[0] == 0
    assert give("doctor", "--plan", *asked)[0] == 0


def test_student_that_is_asked_to_start_from_features_is_refused_in_one_line(here, give):
    for words in (("--modality", "own_imu"), ("--set", "student.modalities=own_imu")):
        code, _, err = give("distill", "--teacher", "none", *words)
        assert code == 1
        assert "own_imu" in err.strip().splitlines()[-1]
        assert "starts from raw clips" in err.strip().splitlines()[-1]
