"""The embedded sample data: its plan, its table, its files, and what its modalities show."""

import csv
import io
import json
import subprocess
import sys
import tomllib
from collections import Counter

import av
import numpy as np
import pytest
from karmma.data.errors import ConfigError
from karmma.data.sample import NOUNS, VERBS, ClipPlan, plan_clips, write_sample
from karmma.data.sample_media import LOOKS, draw_boxes, draw_frames, draw_sound, encode

N_CLIPS = 24
AXIS_AND_SIGN = {"push": (0, 1), "pull": (0, -1), "lift": (1, -1), "lower": (1, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("sample"), N_CLIPS).parent


@pytest.fixture(scope="module")
def plans():
    return plan_clips(480, 0)


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _rows(folder):
    return list(csv.DictReader((folder / "clips.csv").read_text().splitlines()))


def _decoded(media):
    """Return pictures [24, 96, 96, 3], their times, and the sound or None, as PyAV decodes them."""
    with av.open(media) as file:
        frames = list(file.decode(video=0))
    media.seek(0)
    with av.open(media) as file:
        sound = [block.to_ndarray()[0] for block in file.decode(audio=0)] if file.streams.audio else []
    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return pictures, [frame.time for frame in frames], np.concatenate(sound) if sound else None


def _is_clean(plan: ClipPlan) -> bool:
    spoiled = plan.hidden or plan.frozen or plan.covered or plan.panned or plan.distracted
    return not spoiled and plan.sound == plan.boxes == "clear"


def _colour_centre(picture):
    """Return x, y of the colourful pixels: the object, as background and hand are muted."""
    y, x = np.nonzero(np.ptp(picture.astype(int), axis=2) > 80)
    return np.array([x.mean(), y.mean()])


def _box_centres(boxes):
    labels = [label for frame in boxes["frames"] for label in frame["labels"] if label["category"] == "object"]
    found = [label["box2d"] for label in labels]
    return np.array([[(box["x1"] + box["x2"]) / 2, (box["y1"] + box["y2"]) / 2] for box in found])


def test_plan_at_full_number_is_balanced_and_split_in_every_class(plans):
    assert Counter(plan.split for plan in plans) == {"train": 300, "val": 60, "test": 120}
    assert set(Counter((plan.verb, plan.noun) for plan in plans).values()) == {20}
    trained = Counter((plan.verb, plan.noun) for plan in plans if plan.split == "train")
    assert len(trained) == len(VERBS) * len(NOUNS)
    assert min(trained.values()) >= 10
    assert {plan.split for plan in plans if plan.participant == "P06"} == {"test"}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_plan_at_full_number_spoils_each_modality_in_the_stated_share_of_every_split(plans, split):
    chosen = [plan for plan in plans if plan.split == split]

    def share(condition):
        return sum(condition(plan) for plan in chosen) / len(chosen)

    assert share(lambda plan: plan.hidden) == pytest.approx(0.26, abs=0.05)
    assert share(lambda plan: plan.frozen) == pytest.approx(0.12, abs=0.05)
    assert share(lambda plan: plan.covered) == pytest.approx(0.08, abs=0.05)
    assert share(lambda plan: plan.sound != "clear") == pytest.approx(0.39, abs=0.05)
    assert share(lambda plan: plan.sound == "absent") == pytest.approx(0.08, abs=0.05)
    assert share(lambda plan: plan.boxes != "clear") == pytest.approx(0.40, abs=0.05)
    assert 0 < share(lambda plan: plan.boxes == "absent") == pytest.approx(0.06, abs=0.05)


def test_plan_at_full_number_seldom_spoils_all_that_know_a_head(plans):
    noun = [plan for plan in plans if (plan.hidden or plan.covered) and plan.sound != "clear"]
    verb = [plan for plan in plans if (plan.frozen or plan.covered) and plan.boxes != "clear"]
    assert 0 < len(noun) < 0.06 * len(plans)
    assert 0 < len(verb) < 0.06 * len(plans)


def test_plan_of_fewer_clips_is_the_start_of_the_longer_one(plans):
    assert plan_clips(30, 0) == plans[:30]
    assert plan_clips(30, 1) != plans[:30]


def test_write_sample_twice_gives_the_same_bytes_and_another_seed_gives_others(folder, tmp_path):
    write_sample(tmp_path / "again", 8)
    write_sample(tmp_path / "other", 8, seed=1)
    first, again, other = _files(folder), _files(tmp_path / "again"), _files(tmp_path / "other")
    media = [name for name in again if name.startswith(("videos", "boxes"))]
    assert len(media) > 8
    assert {name: again[name] for name in media} == {name: first[name] for name in media}
    assert again["videos/clip_0003.mp4"] != other["videos/clip_0003.mp4"]


def test_encoding_depends_on_nothing_that_memory_held_before(plans):
    frames, sound = draw_frames(plans[11]), draw_sound(plans[11])
    found = set()
    for turn in range(6):
        found.add(encode(frames, sound))
        np.full(200_000 * turn + 100_000, 37 * turn, np.uint8)  # freed at once, for the encoder to find
    assert len(found) == 1


def test_table_names_existing_files_and_settings_point_at_it(folder):
    rows, settings = _rows(folder), tomllib.loads((folder / "karmma.toml").read_text())
    named = "clip_id video start_s stop_s split participant verb noun detections".split()
    assert list(rows[0]) == named
    assert [row["clip_id"] for row in rows] == [f"clip_{index:04d}" for index in range(N_CLIPS)]
    assert all((folder / row["video"]).is_file() for row in rows)
    boxes = {row["detections"] for row in rows} - {""}
    assert boxes == {str(path.relative_to(folder)) for path in (folder / "boxes").iterdir()}
    assert Counter(row["split"] for row in rows) == {"train": 15, "val": 3, "test": 6}
    assert settings["preset"] == "tiny"
    assert settings["data"]["table"] == "clips.csv"
    assert settings["data"]["heads"] == ["verb", "noun"]


def test_written_media_decode_to_24_pictures_and_sound_where_planned(folder):
    sounds = []
    for plan in plan_clips(N_CLIPS, 0):
        media = io.BytesIO((folder / "videos" / f"{plan.clip_id}.mp4").read_bytes())
        with av.open(media) as file:
            assert file.streams.video[0].codec_context.name == "h264"
            assert all(stream.codec_context.name == "aac" for stream in file.streams.audio)
            assert all(stream.rate == 16000 and stream.channels == 1 for stream in file.streams.audio)
        media.seek(0)
        pictures, times, sound = _decoded(media)
        assert pictures.shape == (24, 96, 96, 3)
        assert times == [frame / 16 for frame in range(24)]
        assert (sound is None) == (plan.sound == "absent")
        if sound is not None:
            assert 24000 <= sound.size <= 24000 + 1024
            sounds.append(sound)
    assert sounds


def test_clip_planned_without_sound_has_no_sound_track(plans):
    plan = next(plan for plan in plans if plan.sound == "absent")
    with av.open(io.BytesIO(encode(draw_frames(plan), draw_sound(plan)))) as file:
        assert len(file.streams.video) == 1
        assert not file.streams.audio


@pytest.mark.parametrize("verb", VERBS)
def test_clean_clip_moves_its_verbs_way_in_pictures_and_boxes(plans, verb):
    axis, sign = AXIS_AND_SIGN[verb]
    for plan in [plan for plan in plans if plan.verb == verb and _is_clean(plan)][:3]:
        pictures = _decoded(io.BytesIO(encode(draw_frames(plan), None)))[0]
        seen = _colour_centre(pictures[-1]) - _colour_centre(pictures[0])
        boxed = _box_centres(draw_boxes(plan))
        for shift in (seen, boxed[-1] - boxed[0]):
            assert sign * shift[axis] > 30
            assert abs(shift[1 - axis]) < 16  # the hand hides a part of the object, now more, now less


def test_boxes_of_clean_clip_lie_on_the_object_seen(plans):
    plan = next(plan for plan in plans if _is_clean(plan))
    for picture, frame in zip(draw_frames(plan), draw_boxes(plan)["frames"], strict=True):
        x, y = _colour_centre(picture)
        for box in [label["box2d"] for label in frame["labels"] if label["standard_category"] == "0000"]:
            assert box["x1"] < x < box["x2"]
            assert box["y1"] < y < box["y2"]


def test_boxes_that_are_still_or_dropped_do_not_show_the_verb(plans):
    still = draw_boxes(next(plan for plan in plans if plan.boxes == "still"))
    assert np.ptp(_box_centres(still), axis=0).max() < 10
    boxed = [draw_boxes(plan) for plan in plans[:20] if plan.boxes == "clear"]
    seen = [len(_box_centres(boxes)) / 24 for boxes in boxed]
    assert 0.8 < np.mean(seen) < 0.97


def test_box_file_has_one_entry_per_picture_with_boxes_inside_it(folder):
    boxes = json.loads((folder / _rows(folder)[0]["detections"]).read_text())
    assert (boxes["fps"], boxes["width"], boxes["height"]) == (16, 96, 96)
    assert [frame["name"] for frame in boxes["frames"]] == [f"clip_0000/{number:04d}.jpg" for number in range(1, 25)]
    labels = [label for frame in boxes["frames"] for label in frame["labels"]]
    assert {label["standard_category"] for label in labels} <= {"0000", "hand"}
    assert all(0 <= value <= 96 for label in labels for value in label["box2d"].values())


@pytest.mark.parametrize("noun", NOUNS)
def test_clear_sound_survives_aac_and_peaks_at_the_nouns_pitch(plans, noun):
    plan = next(plan for plan in plans if plan.noun == noun and plan.sound == "clear")
    sound = _decoded(io.BytesIO(encode(draw_frames(plan)[:1], draw_sound(plan))))[2]
    peak = np.abs(np.fft.rfft(sound)).argmax() * 16000 / sound.size
    assert peak == pytest.approx(LOOKS[noun].pitch_hz, rel=0.05)


def test_spoiled_sound_does_not_peak_at_the_nouns_pitch(plans):
    spoiled = [plan for plan in plans if plan.sound in ("drowned", "others")][:20]
    for plan in spoiled:
        power, pitch = np.abs(np.fft.rfft(draw_sound(plan))) ** 2, LOOKS[plan.noun].pitch_hz
        near = slice(int(0.96 * pitch * 1.5), int(1.04 * pitch * 1.5) + 1)  # a bin is 1 / 1.5 s wide
        assert power[near].sum() < 0.2 * power.sum()


def test_frozen_and_covered_pictures_do_not_show_the_motion(plans):
    frozen = draw_frames(next(plan for plan in plans if plan.frozen))
    assert (frozen == frozen[0]).all()
    covered = draw_frames(next(plan for plan in plans if plan.covered))[:, 6:-6, 6:-6].astype(float)
    assert np.abs(covered[0] - covered[-1]).mean() < 8


def test_hidden_look_has_no_colour(plans):
    seen = next(plan for plan in plans if _is_clean(plan) and not plan.hand)
    hidden = next(plan for plan in plans if plan.hidden and not plan.hand and not plan.covered)
    spread = [np.ptp(draw_frames(plan).astype(int), axis=-1).max() for plan in (seen, hidden)]
    assert spread[0] > 100 > 60 > spread[1]


def test_interrupted_writing_is_taken_up_where_it_stopped(folder, tmp_path):
    def stop_at_third(n):
        stopped.append(n)
        if len(stopped) == 3:
            raise KeyboardInterrupt

    stopped, resumed = [], []
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path, N_CLIPS, progress=stop_at_third)
    assert not (tmp_path / "karmma.toml").exists()
    assert write_sample(tmp_path, N_CLIPS, progress=resumed.append) == tmp_path / "karmma.toml"
    assert resumed == [3] + [1] * (N_CLIPS - 3)
    assert _files(tmp_path) == _files(folder)


def test_left_over_clips_of_another_seed_are_not_kept(tmp_path):
    write_sample(tmp_path / "mixed", 2, seed=1)
    write_sample(tmp_path / "mixed", 2, seed=0)
    write_sample(tmp_path / "fresh", 2, seed=0)
    assert _files(tmp_path / "mixed") == _files(tmp_path / "fresh")


def test_finished_sample_is_returned_without_heavy_imports_and_keeps_edited_settings(tmp_path):
    settings = write_sample(tmp_path, 1)
    edited = settings.read_text() + "frames = 4\n"
    settings.write_text(edited)
    code = (
        "import sys, pathlib, karmma.data.sample as sample; "
        "print(sample.write_sample(pathlib.Path(sys.argv[1]), 1)); "
        "sys.exit(any(name in sys.modules for name in ('av', 'cv2', 'numpy', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(settings)), done.stderr
    assert settings.read_text() == edited


def test_folder_with_settings_of_ones_own_is_refused_and_left_alone(tmp_path):
    (tmp_path / "karmma.toml").write_text('preset = "paper"\n')
    with pytest.raises(ConfigError, match=r"karmma\.toml: not written with the sample data.*Choose another folder"):
        write_sample(tmp_path, 2)
    assert _files(tmp_path) == {"karmma.toml": b'preset = "paper"\n'}


@pytest.mark.parametrize(("n_clips", "seed"), [(0, 0), (2, -1)])
def test_impossible_number_or_seed_is_refused(tmp_path, n_clips, seed):
    with pytest.raises(ConfigError, match=f"{n_clips} clips from seed {seed}"):
        write_sample(tmp_path, n_clips, seed)
