"""Checking a table against its files: every bad row is listed, with its reason."""

import json
import wave

import numpy as np
import pytest
from karmma.data.check import check_clips, unreadable_frames
from karmma.data.clips import read_rows
from karmma.data.config import DataConfig

SOUND = np.zeros(16_000, np.float32)


@pytest.fixture
def made(tmp_path, film):
    """A folder with a film of two seconds, and a function that checks a table in it."""
    film("two.mp4", [k / 25 for k in range(50)], sound=SOUND)
    (tmp_path / "bad.mp4").write_bytes(b"not a film")
    (tmp_path / "boxes.json").write_text(json.dumps([]))

    def check(text, **settings):
        (tmp_path / "t.csv").write_text(text)
        data = DataConfig(table=tmp_path / "t.csv", heads=("verb",), **settings)
        table, bad = read_rows(data, ("verb",))
        bad += check_clips(table, data)
        return {row.clip_id: row.reason for row in bad}

    return check


def test_good_table_has_no_bad_rows(made):
    assert made("clip_id,video,start_s,stop_s,verb\na,two.mp4,0,2,x\nb,two.mp4,,,\nc,two.mp4,1.5,2.04,x\n") == {}


def test_every_bad_row_is_listed_with_its_reason(made):
    found = made(
        "clip_id,video,start_s,stop_s,audio,detections,verb\n"
        "fine,two.mp4,0,2,,,x\n"
        "gone,three.mp4,0,1,,,x\n"
        "broken,bad.mp4,0,1,,,x\n"
        "late,two.mp4,2.5,3,,,x\n"
        "long,two.mp4,1,2.5,,,x\n"
        "back,two.mp4,1,0.5,,,x\n"
        "fine,two.mp4,0,1,,,x\n"
        "deaf,two.mp4,0,1,none.wav,,x\n"
        "blind,two.mp4,0,1,,boxes.json,x\n",
        modalities=("video", "audio", "detections"),
    )
    assert "three.mp4: no such file" in found["gone"]
    assert "bad.mp4: not a media file" in found["broken"]
    assert "start_s = 2.5, but" in found["late"]
    assert "ends at 2.000 s" in found["late"]
    assert "stop_s = 2.5, but" in found["long"]
    assert "stop_s = 0.5 is not after start_s = 1" in found["back"]
    assert "'fine' is taken by line 2" in found["fine"]
    assert "audio: " in found["deaf"]
    assert "none.wav: no such file" in found["deaf"]
    assert "blind" not in found
    assert len(found) == 7


def test_missing_flow_folder_is_listed_by_its_part(made, tmp_path):
    (tmp_path / "flow/u").mkdir(parents=True)
    found = made(
        "clip_id,video,flow,verb\na,two.mp4,flow,x\n", modalities=("video", "flow"), flow_method="released", flow_fps=25
    )
    assert found == {"a": f"flow: {tmp_path / 'flow/v'}: no such file"}


def test_label_that_is_never_trained_is_listed(made):
    found = made("clip_id,video,split,verb\na,two.mp4,train,x\nb,two.mp4,val,x\nc,two.mp4,test,y\nd,two.mp4,test,\n")
    assert found == {"c": "verb = 'y', which no training clip has"}


def test_folder_of_frames_needs_a_rate(made, tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/0001.jpg").write_bytes(b"")
    found = made("clip_id,video,verb\na,frames,x\n", modalities=("video",))
    assert "Set video_fps" in found["a"]
    assert made("clip_id,video,verb\na,frames,x\n", modalities=("video",), video_fps=10) == {}


def test_real_rows_without_a_clip_are_all_listed(shared_data):
    data = DataConfig(
        table=shared_data / "ssv2/train.json", val_table=shared_data / "ssv2/validation.json", heads=("action",),
        media=shared_data / "ssv2", video_files="videos/{video_id}.webm", modalities=("video",),
    )  # fmt: skip
    table, bad = read_rows(data, ("action",))
    assert not bad
    missing = [row for row in check_clips(table, data) if "no such file" in row.reason]
    assert {row.clip_id for row in missing} == {*table.clip_ids[table.rows("val")].tolist()}
    assert len(missing) == 106


@pytest.mark.parametrize("modality", ["audio", "detections", "video"])
def test_frames_that_are_read_are_those_of_the_modalities(made, tmp_path, modality):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(64_000))
    (tmp_path / "broken.json").write_text("{")
    text = (
        "clip_id,video,start_s,detections,verb\nfine,two.mp4,0,boxes.json,x\nheard,sound.wav,0,,x\n"
        "late,two.mp4,3,,x\nbroken,two.mp4,0,broken.json,x\n"
    )
    (tmp_path / "t.csv").write_text(text)
    data = DataConfig(table=tmp_path / "t.csv", heads=("verb",), modalities=(modality,))
    table, _ = read_rows(data, ("verb",))
    failed = unreadable_frames(table, np.arange(4), data, n_readers=1)
    assert {*failed} == ({"late", "broken"} if modality == "detections" else {"late"})
    assert "start_s = 3" in failed["late"]
