"""`karmma predict`: raw files in, classes out; timelines, videos, folders, and everything that can be wrong."""

import csv
import json
import shutil
from functools import partial

import cv2
import karmma
import numpy as np
import pytest
from karmma import cli_options, cli_predict
from karmma.data.media import Media
from karmma.data.sample import write_sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=4)
    return folder


@pytest.fixture
def predict(tmp_path, monkeypatch, give, student_run, sample):
    """Run the command in a folder with four films and the run; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_predict.out, "width", 200)
    monkeypatch.setattr(cli_options, "err", cli_options.Console(stderr=True, highlight=False, emoji=False, width=200))
    shutil.copytree(student_run, tmp_path / "runs" / "student-tiny")
    shutil.copytree(sample / "videos", tmp_path / "films")
    shutil.copytree(sample / "boxes", tmp_path / "boxes")

    return partial(give, "predict")


def test_one_file_gives_a_table_of_its_likeliest_classes(predict, student_run):
    code, out, err = predict("films/clip_0000.mp4", "--top", "2")
    said = karmma.load(student_run, "cpu").predict("films/clip_0000.mp4")
    assert code == 0
    assert "Run: runs/student-tiny" in err
    for head in said:
        for name, prob in said.top(head, 2):
            assert f"{prob:6.1%} {name}" in out
        assert said.top(head, 3)[2][0] not in out.replace(" + ".join(said.actions(2)[1][0]), "")
    assert " + ".join(said.actions(1)[0][0]) in out
    assert "films/clip_0000.mp4" in out


def test_json_is_one_value_with_what_python_says(predict, student_run):
    code, out, _ = predict("films/clip_0001.mp4", "--json", "--top", "3", "--detections", "boxes/clip_0001.json")
    said = karmma.load(student_run, "cpu").predict("films/clip_0001.mp4", files={"detections": "boxes/clip_0001.json"})
    found = json.loads(out)
    assert code == 0
    assert found["run"] == "runs/student-tiny"
    assert found["failed"] == []
    (one,) = found["predictions"]
    wanted = json.loads(json.dumps(said.record(3)))
    assert one["modalities"] == ["video", "audio", "detections"]
    assert one["missing"] == {}
    for head, classes in wanted.pop("heads").items():
        assert [each["class"] for each in one["heads"][head]] == [each["class"] for each in classes]
        assert [each["prob"] for each in one["heads"][head]] == pytest.approx([each["prob"] for each in classes])
    assert len(one["action"]) == 3


def test_modalities_are_those_asked_for(predict):
    code, out, _ = predict("films/clip_0001.mp4", "--json", "--modalities", "video,detections")
    assert code == 0
    assert json.loads(out)["predictions"][0]["modalities"] == ["video"]
    code, _, err = predict("films/clip_0001.mp4", "--modalities", "flow")
    assert code == 1
    assert "This student does not know flow. Choose from video, audio, detections." in err


def test_folder_is_predicted_with_progress_and_one_bad_file_is_named(predict, tmp_path):
    (tmp_path / "films" / "clip_0002.mp4").write_bytes(b"no film")
    code, out, err = predict("films", "--json", "--batch-size", "2")
    found = json.loads(out)
    assert code == 3
    assert [one["file"] for one in found["predictions"]] == [f"films/clip_000{k}.mp4" for k in (0, 1, 3)]
    assert [one["file"] for one in found["failed"]] == ["films/clip_0002.mp4"]
    assert "predict: 4/4 clips" in err
    assert "failed: films/clip_0002.mp4: video and audio failed: not a media file" in err


def test_failure_that_is_allowed_counts_as_missing_is_told_and_ends_with_3(predict, tmp_path):
    (tmp_path / "mic.wav").write_bytes(b"no sound")
    asked = ("films/clip_0000.mp4", "--audio", "mic.wav", "--json")
    code, out, err = predict(*asked)
    assert (code, out) == (1, "")
    assert "MediaError: films/clip_0000.mp4: audio failed: mic.wav: not a media file" in err
    code, out, err = predict(*asked, "--allow-failures")
    assert code == 3
    assert "failed and counted as missing: audio of films/clip_0000.mp4: mic.wav: not a media file" in err
    (one,) = json.loads(out)["predictions"]
    assert (one["modalities"], one["failed"]) == (["video"], ["audio"])


def test_long_video_gives_a_timeline_and_a_video_with_it_drawn_in(predict, tmp_path):
    asked = ("--window", "0.5", "--stride", "0.25", "--top", "1", "--video", "out.mp4")
    code, out, err = predict("films/clip_0001.mp4", *asked)
    assert code == 0, err
    with open(tmp_path / "clip_0001_timeline.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    starts = [float(row["start_s"]) for row in rows]
    assert starts == pytest.approx([0.25 * k for k in range(5)])
    assert float(rows[-1]["stop_s"]) == 1.5
    assert set(rows[0]) == {"file", "start_s", "stop_s", "modalities"} | {
        f"{head}_1{kind}" for head in ("verb", "noun", "action") for kind in ("", "_prob")
    }
    assert rows[0]["verb_1"] in out
    with Media(tmp_path / "films/clip_0001.mp4") as one, Media(tmp_path / "out.mp4") as other:
        times = [[frame.time for frame in media.frames(0.0)] for media in (one, other)]
        assert times[0] == pytest.approx(times[1], abs=1e-4)
        assert other.has_sound == one.has_sound
    assert f"Wrote out.mp4: {len(times[0])} frames." in err
    assert "Wrote clip_0001_timeline.csv: 5 rows." in err
    assert err.count("draw: 1/1 s") == 1


def test_timelines_of_several_files_share_one_csv(predict, tmp_path):
    code, _, err = predict("films", "--window", "1")
    assert code == 0, err
    with open(tmp_path / "timeline.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"films/clip_000{k // 2}.mp4" for k in range(8)]


def test_csv_and_video_of_whole_files(predict, tmp_path):
    code, _, _ = predict("films/clip_0000.mp4", "--csv", "all.csv", "--video", "out.mkv")
    assert code == 0
    with open(tmp_path / "all.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["start_s"], row["stop_s"]) == ("0.000", "")
    assert (tmp_path / "out.mkv").exists()


def test_video_that_cannot_be_drawn_is_told_after_all_else(predict, tmp_path):
    import wave

    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(64_000))
    code, out, err = predict("s.wav", "--video", "out.mp4", "--top", "1")
    assert code == 3
    assert "s.wav" in out
    assert "failed: out.mp4 was not written: s.wav: has no picture to draw into" in err
    assert not (tmp_path / "out.mp4").exists()


def test_window_that_fails_is_named_and_has_no_row(predict, tmp_path):
    (tmp_path / "frames").mkdir()
    for number in {*range(1, 17)} - {7}:
        picture = np.full((48, 64, 3), 10 * number, np.uint8)
        (tmp_path / "frames" / f"{number:04d}.jpg").write_bytes(cv2.imencode(".jpg", picture)[1].tobytes())
    asked = ("frames", "--video-fps", "8", "--window", "0.5", "--csv", "t.csv", "--video", "out.mp4")
    code, _, err = predict(*asked)
    assert code == 3
    with open(tmp_path / "t.csv", newline="") as file:
        assert [row["start_s"] for row in csv.DictReader(file)] == ["0.000", "1.000", "1.500"]
    assert "failed: frames, 0.5 to 1 s: video failed: " in err
    assert "0007.jpg is missing" in err
    assert "failed: out.mp4 was not written: frames: ends at 0.750 s before its time: 0007.jpg is missing" in err
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ((), 2, "Missing argument 'FILE...'"),
        (("films", "--stride", "1"), 2, "--stride is that of --window"),
        (("films", "--top", "0"), 2, "--top"),
        (("no.mp4",), 1, "MediaError: no.mp4: no such file or folder. Correct the name."),
        (("no.mp4", "neither.mp4"), 1, "None of 2 can be predicted"),
        (("films/clip_0000.mp4", "--run", "nowhere"), 1, "RunError: nowhere: no run here"),
        (("films/clip_0000.mp4", "--runs", "nowhere"), 1, "RunError: nowhere: no finished student here"),
        (("films/clip_0000.mp4", "--video", "out.gif"), 1, "out.gif: a video is written as .mp4, .mov, .mkv"),
        (("films/clip_0000.mp4", "--video", "films/clip_0000.mp4"), 1, "is the FILE itself"),
        (("films", "--video", "out.mp4"), 1, "--video: for one FILE, found 4. Name one."),
        (("films", "--audio", "films/clip_0000.mp4"), 1, "--audio: for one FILE, found 4"),
        (("films/clip_0000.mp4", "--detections", "no.json"), 1, "no.json: no such file"),
        (("films/clip_0000.mp4", "--window", "0"), 1, "window = 0 s, stride = 0 s: expected seconds above 0"),
        (("films/clip_0000.mp4", "--csv", "runs/student-tiny/config.json/t.csv"), 1, "cannot be written"),
        (("boxes/clip_0000.json",), 1, "not a media file"),
        (("boxes",), 1, "boxes: holds no media file"),
        (("films/clip_0000.mp4", "--device", "gpu7"), 1, "device = 'gpu7'"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(predict, args, code, said):
    found, _, err = predict(*args)
    assert found == code, err
    assert said in err
    assert "Traceback" not in err
