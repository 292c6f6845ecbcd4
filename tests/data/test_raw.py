import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from karmma.data.annotations import Clip
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.media import Media
from karmma.data.modality import ABSENT, FAILED, MODALITIES, PRESENT
from karmma.data.raw import read_clip, read_clips
from karmma.data.views import View, draw_view
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_small

DATA = DataConfig(
    frames=4,
    size=64,
    center_crop=1.0,
    flip=True,
    flow_size=64,
    audio_segment_s=0.128,
    audio_hop=64,
    audio_steps=32,
    audio_window=256,
    audio_mels=24,
    max_boxes=2,
)
TIMES = [k / 25 for k in range(50)]
SOUND = 0.3 * np.sin(2 * np.pi * 700 * np.arange(32_000) / 16_000)
CLEAN = draw_view("a", 0, DATA)


def clip(video, start_s=0.0, stop_s=2.0, **sources):
    return Clip("a", Path(video), start_s, stop_s, sources)


def states(readings):
    return {name: reading.state for name, reading in readings.items()}


def drifting(n):
    """Return pictures of coarse squares that move two pixels to the right from frame to frame."""
    ground = np.kron(np.random.default_rng(0).integers(0, 255, (8, 24), np.uint8), np.ones((8, 8), np.uint8))
    return [np.repeat(ground[:, 100 - 2 * k : 164 - 2 * k, None], 3, 2) for k in range(n)]


@pytest.fixture
def boxes(tmp_path):
    label = {"box2d": {"x1": 16, "y1": 0, "x2": 32, "y2": 64}, "standard_category": "hand"}
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"fps": 25, "width": 64, "height": 64, "frames": [{"labels": [label]}] * 50}))
    return path


def test_read_clip_gives_every_modality_at_the_middles_of_its_spans(film, boxes, number_in):
    path = film("a.mp4", TIMES, sound=SOUND)
    readings = read_clip(clip(path, detections=boxes), CLEAN, MODALITIES, DATA)
    assert tuple(readings) == MODALITIES
    assert set(states(readings).values()) == {PRESENT}
    for name, reading in readings.items():
        assert reading.array.shape == (DATA.input_shape(name) if name != "detections" else (4, 2, 6))
        assert reading.array.dtype == (np.uint8 if name in ("video", "flow") else np.float32)
        assert reading.array.flags.c_contiguous
    shown = [number_in(picture.transpose(1, 2, 0)) for picture in readings["video"].array]
    assert shown == [6, 18, 31, 43]  # 0.25, 0.75, 1.25, 1.75 s at 25 frames a second
    assert readings["detections"].array[0, 0] == pytest.approx([0.25, 0, 0.5, 1, 1, 1])


def test_read_clip_of_a_later_span_shows_that_span(film, number_in):
    path = film("a.mp4", TIMES)
    array = read_clip(clip(path, 1.2, 1.6), CLEAN, ("video",), DATA)["video"].array
    assert [number_in(picture.transpose(1, 2, 0)) for picture in array] == [31, 33, 36, 38]


def test_read_clip_gives_a_modality_the_same_alone_and_with_others(film, boxes):
    one = clip(film("a.mp4", TIMES, sound=SOUND), detections=boxes)
    view = draw_view("a", 3, DATA)
    together = read_clip(one, view, MODALITIES, DATA)
    for name in MODALITIES:
        alone = read_clip(one, view, (name,), DATA)
        assert tuple(alone) == (name,)
        assert (alone[name].array == together[name].array).all()


def test_read_clip_of_a_view_is_the_same_each_time_and_differs_from_another(film):
    one = clip(film("a.mp4", TIMES, drifting(50), sound=SOUND * np.linspace(0, 1, len(SOUND))))
    names = ("video", "flow", "audio")
    first = read_clip(one, draw_view("a", 1, DATA), names, DATA)
    read_clip(one, draw_view("a", 2, DATA), names, DATA)
    again = read_clip(one, draw_view("a", 1, DATA), names, DATA)
    other = read_clip(one, draw_view("a", 2, DATA), names, DATA)
    for name in names:
        assert (first[name].array == again[name].array).all()
        assert (first[name].array != other[name].array).any()


def test_read_clip_mirrored_mirrors_video_and_boxes_and_turns_flow_around(film, boxes):
    one = clip(film("a.mp4", TIMES, drifting(50)), detections=boxes)
    plain, mirrored = (
        read_clip(one, View(1, (0.5,) * 4, 1.0, (0.5, 0.5), flip), MODALITIES, DATA) for flip in (False, True)
    )
    assert (mirrored["video"].array == plain["video"].array[..., ::-1]).all()
    u, v = (plain["flow"].array[:, channel].astype(int) for channel in (0, 1))
    assert (mirrored["flow"].array[:, 0] == 256 - u[..., ::-1]).all()
    assert (mirrored["flow"].array[:, 1] == v[..., ::-1]).all()
    assert np.median(u) > 128
    assert mirrored["detections"].array[0, 0] == pytest.approx([0.5, 0, 0.75, 1, 1, 1])


def test_read_clip_without_sound_track_or_boxes_is_absent(film, tmp_path):
    path = film("a.mp4", TIMES)
    readings = read_clip(clip(path), CLEAN, MODALITIES, DATA)
    assert states(readings) == {"video": PRESENT, "flow": PRESENT, "audio": ABSENT, "detections": ABSENT}
    assert readings["audio"].array is None
    assert readings["audio"].reason == f"{path} has no sound track"
    (tmp_path / "b.json").write_text(json.dumps({"fps": 25, "width": 64, "height": 64, "frames": [{"labels": []}]}))
    (tmp_path / "c.json").write_text(json.dumps({"other": []}))
    for name, reason in (("b", "has no box between 0.000 and 2.000 s"), ("c", "has no boxes of a")):
        one = clip(path, detections=tmp_path / f"{name}.json")
        reading = read_clip(one, CLEAN, ("detections",), DATA)["detections"]
        assert reading.state == ABSENT
        assert reason in reading.reason


def test_read_clip_with_empty_cells_is_absent_even_if_the_video_has_them(film):
    one = clip(film("a.mp4", TIMES, sound=SOUND), audio=None, flow=None, detections=None)
    readings = read_clip(one, CLEAN, MODALITIES, DATA)
    assert states(readings) == {"video": PRESENT, "flow": ABSENT, "audio": ABSENT, "detections": ABSENT}
    assert readings["audio"].reason == "the audio cell of the table is empty"


def test_read_clip_of_a_sound_file_has_no_picture(wav):
    path = wav("a.wav", SOUND)
    for stop_s in (2.0, None):
        readings = read_clip(clip(path, stop_s=stop_s), CLEAN, ("video", "flow", "audio"), DATA)
        assert states(readings) == {"video": ABSENT, "flow": ABSENT, "audio": PRESENT}
        assert readings["video"].reason == f"{path} has no video stream"


def test_read_clip_takes_audio_from_its_own_file_even_if_the_video_is_missing(wav, tmp_path):
    path = wav("sound.wav", SOUND)
    readings = read_clip(clip(tmp_path / "none.mp4", audio=path), CLEAN, ("video", "flow", "audio"), DATA)
    assert states(readings) == {"video": FAILED, "flow": FAILED, "audio": PRESENT}
    assert readings["flow"].reason.startswith(f"{tmp_path / 'none.mp4'}: no such file")
    assert (readings["audio"].array == read_clip(clip(path), CLEAN, ("audio",), DATA)["audio"].array).all()


def test_read_clip_fails_modality_by_modality(film, tmp_path):
    path = film("a.mp4", TIMES, sound=SOUND)
    (tmp_path / "bad.json").write_text("[")
    one = clip(path, 1.0, 5.0, detections=tmp_path / "bad.json", flow=tmp_path / "flow")
    readings = read_clip(one, CLEAN, MODALITIES, DATA)
    assert states(readings) == {"video": FAILED, "flow": FAILED, "audio": PRESENT, "detections": FAILED}
    assert "frame at 4.500 s wanted, the video ends at 2.000 s" in readings["video"].reason
    assert "flow_method dis does not read it" in readings["flow"].reason
    for reading in readings.values():
        assert (reading.array is None) == (reading.state == FAILED)


def test_read_clip_names_a_sound_file_without_sound(film, wav):
    silent = film("silent.mp4", TIMES)
    reading = read_clip(clip(wav("a.wav", SOUND), audio=silent), CLEAN, ("audio",), DATA)["audio"]
    assert reading.state == FAILED
    assert reading.reason.startswith(f"{silent}: has no sound track")


def test_read_clip_without_stop_lasts_to_the_end_of_the_file(film, number_in):
    for name in ("a.mp4", "a.mkv"):
        path = film(name, TIMES, sound=SOUND[:24_000])
        whole = read_clip(clip(path, stop_s=None), CLEAN, ("video", "audio"), DATA)
        assert set(states(whole).values()) == {PRESENT}
        shown = [number_in(picture.transpose(1, 2, 0)) for picture in whole["video"].array]
        assert shown == [6, 18, 31, 43]
    late = read_clip(clip(path, 2.5, None), CLEAN, ("video",), DATA)["video"]
    assert late.state == FAILED
    assert "the clip starts at 2.500 s, the file ends at 2.000 s" in late.reason


def test_read_clip_takes_the_size_of_boxes_from_the_upright_video(film, tmp_path):
    tall = np.zeros((128, 64, 3), np.uint8)
    quarter = [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30]
    path = film("a.mp4", TIMES, [tall] * 50, matrix=quarter)  # shown 128 wide, 64 high
    label = {"box2d": {"x1": 32, "y1": 0, "x2": 64, "y2": 32}, "standard_category": "0001"}
    (tmp_path / "boxes.json").write_text(json.dumps({"a": [{"labels": [label]}] * 24}))
    array = read_clip(clip(path, detections=tmp_path / "boxes.json"), CLEAN, ("detections",), DATA)["detections"].array
    assert array[0, 0] == pytest.approx([0, 0, 0.5, 0.5, 1, 2])


@pytest.mark.parametrize("name", ["lrae3s", "sbbbzp", "bbaf2n"])  # the first two have 74 frames, 2.96 of their 3 s
def test_grid_clips_are_present_in_every_view(shared_data, name):
    data = DataConfig(frames=32, size=32, flow_size=48)
    table = read_clip_table(shared_data / "grid/clips.csv", ("verb",))
    one = table.clip(table.clip_ids.tolist().index(name))
    for view in range(4):
        readings = read_clip(one, draw_view(name, view, data), ("video", "flow", "audio"), data)
        assert set(states(readings).values()) == {PRESENT}, readings


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("androidx/mp4/sample_rotate_and_reflect.mp4", "PPP"),
        ("androidx/flac/bear_with_picture.flac", "AAP"),  # a cover picture is no video
        ("iscc/audio/withcover.mp3", "AAP"),
        ("androidx/mp4/sample_vvc.mp4", "PPA"),
        ("decord/tests/test_data/corrupted.mp4", "FFA"),
        ("androidx/mp4/sample_fragmented_sgpd_v2.mp4", "FFA"),  # frames flagged as damaged
        ("file_type/fixture-corrupt.mkv", "FFF"),
        ("file_type/fixture2.mpg", "PPA"),  # no start time in the header
        ("file_type/fixture2.mkv", "PPP"),  # 1.5 s that claim to be 19 minutes
        ("mmaction2/tests/data/test.avi", "PPP"),
        ("torchcodec/nasa_13013.mp4", "PPP"),
        ("file_type/fixture.ac3", "AAP"),  # no time stamp at all
    ],
)
def test_odd_files_are_in_the_state_they_should_be(shared_data, name, state):
    readings = read_clip(clip(shared_data / "odd" / name, stop_s=None), CLEAN, ("video", "flow", "audio"), DATA)
    assert "".join("?PAF"[reading.state] for reading in readings.values()) == state, readings
    for reading in readings.values():
        assert (reading.state == PRESENT) == (reading.array is not None) == (not reading.reason)


def test_something_something_clips_are_present_without_sound(shared_data):
    for path in sorted((shared_data / "ssv2/videos").glob("*.webm"))[:4]:
        readings = read_clip(clip(path, stop_s=None), CLEAN, ("video", "flow", "audio"), DATA)
        assert states(readings) == {"video": PRESENT, "flow": PRESENT, "audio": ABSENT}, readings


def test_codec_without_a_decoder_is_told_apart_from_a_broken_file(shared_data):
    path = shared_data / "odd/androidx/mp4/sample_ac4_level4.mp4"
    reading = read_clip(clip(path, stop_s=None), CLEAN, ("audio",), DATA)["audio"]
    assert reading.state == FAILED
    assert "has no decoder for its audio; the file may be sound" in reading.reason


HOSTILE = {"x" * 3000: "FFF", "a\0b.mp4": "FFF", "folder.mp4": "FFA", "empty.mp4": "FFF", "*.mp4": "FFF", "a**b": "FFF"}


@pytest.mark.parametrize(("name", "state"), HOSTILE.items())
def test_hostile_path_fails_its_clip_and_nothing_else(tmp_path, name, state):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").write_bytes(b"")
    found = read_clip(clip(tmp_path / name), CLEAN, ("video", "flow", "audio"), DATA)
    assert "".join("?PAF"[reading.state] for reading in found.values()) == state


@pytest.mark.parametrize(
    "name", ["file_type/fixture2.3gp", "torchcodec/nasa_13013.mp4", "androidx/mp4/sample_sef_slow_motion.mp4"]
)
def test_sound_does_not_depend_on_what_was_read_before(shared_data, name):
    """Decoders of AAC and others fill bands with noise of their own, which has to be the same noise every time."""
    path = shared_data / "odd" / name
    spans = [(0.1, 1.0), (1.2, 1.9), (0.5, 1.5)]
    clips = [Clip(f"{at}", path, *span, {}) for at, span in enumerate(spans)]
    views = [draw_view(one.clip_id, 0, DATA) for one in clips]
    together = read_clips(clips, views, [("video", "audio")] * 3, DATA)
    for one, view, found in zip(clips, views, together, strict=True):
        alone = read_clip(one, view, ("audio",), DATA)["audio"]
        assert alone.state == found["audio"].state == PRESENT
        assert np.array_equal(alone.array, found["audio"].array)


def test_absurd_sample_rate_or_length_fails_without_filling_the_memory(wav):
    slow = read_clip(clip(wav("slow.wav", SOUND[:100], 1), 0.0, 50.0), CLEAN, ("audio",), DATA)["audio"]
    assert "states 1 samples a second: damaged" in slow.reason
    long = read_clip(clip(wav("a.wav", SOUND), 0.0, 9e7), CLEAN, ("audio",), DATA)["audio"]
    assert "the clip lasts 90000000 s" in long.reason
    assert long.state == slow.state == FAILED


def test_stream_that_damage_adds_midway_fails_the_clip(film, monkeypatch):
    """PyAV raises IndexError where a damaged transport stream announces one stream more than it has opened."""
    path = film("a.mp4", TIMES)
    monkeypatch.setattr(Media, "_seek", lambda self, index, stamp_s: [][index])
    monkeypatch.setattr(Media, "_rewind", lambda self: [][0])
    reading = read_clip(clip(path), CLEAN, ("video",), DATA)["video"]
    assert reading.state == FAILED
    assert "list index out of range" in reading.reason


def test_sound_from_a_pack_is_that_of_the_wave(wav, film, tmp_path):
    with h5py.File(tmp_path / "sound.h5", "w") as file:
        file["v1"] = np.rint(SOUND * 32767).astype(np.int16)
    path = film("a.mp4", TIMES)
    packed = clip(path, audio=tmp_path / "sound.h5::v1")
    found = read_clip(replace(packed, rates={"audio": 16_000}), CLEAN, ("video", "audio"), DATA)
    expected = read_clip(clip(path, audio=wav("a.wav", SOUND)), CLEAN, ("audio",), DATA)["audio"]
    assert states(found) == {"video": PRESENT, "audio": PRESENT}
    assert np.abs(found["audio"].array - expected.array).max() < 1e-4
    assert "Set audio_hz" in read_clip(packed, CLEAN, ("audio",), DATA)["audio"].reason


@pytest.mark.parametrize("method", ["farneback", "raft_small"])
def test_flow_of_a_clip_by_other_methods_has_the_same_form(film, tmp_path, method):
    weights = None
    if method == "raft_small":
        weights = tmp_path / "raft.safetensors"
        save_file(raft_small(weights=None).state_dict(), weights)
    data = DATA.model_copy(update={"flow_method": method, "flow_weights": weights, "flow_size": 64})
    reading = read_clip(clip(film("a.mp4", TIMES)), CLEAN, ("flow",), data)["flow"]
    assert reading.state == PRESENT
    assert (reading.array.shape, reading.array.dtype) == (data.input_shape("flow"), np.uint8)
