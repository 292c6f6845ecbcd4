"""The real excerpts of EPIC-KITCHENS, Something-Something and Something-Else, from their own tables to arrays."""

import json
from dataclasses import replace

import pytest
from karmma.data.annotations import Clip
from karmma.data.clips import read_clips
from karmma.data.config import DataConfig
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.raw import read_clip
from karmma.data.readers import ReaderPool
from karmma.data.views import draw_view

SMALL = {"frames": 8, "size": 32, "flow_size": 64}


def states(table, data, views=(0, 1)):
    """Read all clips of a table as extraction does; return clip_id -> states by modality, views side by side."""
    clips = [table.clip(row) for row in range(table.n_clips)]
    found = {clip.clip_id: {name: [] for name in data.modalities} for clip in clips}
    with ReaderPool(2, data) as pool:
        for view in views:
            futures = pool.submit([(clip, view, data.modalities) for clip in clips])
            for clip, future in zip(clips, futures, strict=True):
                for name, reading in future.result().items():
                    assert (reading.array is not None) == (reading.state == PRESENT), reading.reason
                    found[clip.clip_id][name].append(reading.state)
    return found


def test_epic_actions_are_read_from_their_frames_and_released_flow(shared_data):
    data = DataConfig(
        table=shared_data / "epic/frames_actions.csv", modalities=("video", "flow", "audio"), flow_method="released",
        video_files="rgb_frames/{participant}/{video_id}", flow_files="flow_frames/{participant}/{video_id}", **SMALL,
    )  # fmt: skip
    table = read_clips(data)
    assert [(clip.start_s, clip.stop_s) for clip in map(table.clip, (0, 1))] == [(341.4, 342.22), (344.05, 345.0)]
    assert table.classes("noun")[table.labels("noun")[0]] == "fork"
    for found in states(table, data).values():
        assert found == {"video": [PRESENT] * 2, "flow": [PRESENT] * 2, "audio": [ABSENT] * 2}


def test_something_something_clips_are_read_and_missing_ones_fail_by_name(shared_data):
    folder = shared_data / "ssv2"
    data = DataConfig(
        table=folder / "train.json", test_table=folder / "unlabelled.json", heads=("action",), **SMALL,
        modalities=("video", "flow", "audio", "detections"), video_files="videos/{video_id}.webm",
        detections_files=str(shared_data / "boxes/annotations*.json"),
    )  # fmt: skip
    found = states(read_clips(data), data)
    assert len(found) == 20
    for clip_id, by_name in found.items():
        seen, unseen = [PRESENT] * 2, [ABSENT] * 2
        assert by_name == {"video": seen, "flow": seen, "audio": unseen, "detections": unseen}, clip_id
    missing = read_clips(data.model_copy(update={"table": folder / "validation.json", "test_table": None})).clip(0)
    reading = read_clip(missing, draw_view(missing.clip_id, 0, data), ("video",), data)["video"]
    assert reading.state == FAILED
    assert f"videos/{missing.video_id}.webm: no such file" in reading.reason


def test_something_else_videos_have_frames_and_boxes(shared_data):
    folder = shared_data / "boxes"
    data = DataConfig(modalities=("video", "detections"), **SMALL)
    for path in sorted((folder / "videos").iterdir()):
        clip = Clip(path.name, path, 0.0, None, {"detections": folder / "annotations.json"}, path.name, {"video": 12})
        found = read_clip(clip, draw_view(path.name, 0, data), ("video", "detections"), data)
        assert {reading.state for reading in found.values()} == {PRESENT}, found
        boxes = found["detections"].array
        assert (boxes[..., 5] > 0).any()
        assert boxes[..., :4].min() >= 0
        assert boxes[..., :4].max() <= 1


def test_frames_after_the_last_annotated_one_have_no_box(shared_data):
    """Video 22983: 64 frames, boxes for the first 52."""
    folder = shared_data / "boxes"
    sources = {"detections": folder / "annotations.json"}
    clip = Clip("22983", folder / "videos/22983", 0.0, None, sources, "22983", {"video": 12})
    data = DataConfig(frames=64, size=16, center_crop=1.0)
    boxes = read_clip(clip, draw_view("22983", 0, data), ("detections",), data)["detections"].array
    official = json.loads((folder / "annotations.json").read_text())["22983"]
    n_boxes = [len(frame["labels"]) for frame in official] + [0] * 12
    seen = [int((rows[:, 5] > 0).sum()) for rows in boxes]
    assert all(few <= many for few, many in zip(seen, n_boxes, strict=True))  # the crop may leave some out
    assert seen[52:] == [0] * 12
    assert sum(seen) > 0.8 * sum(n_boxes)


@pytest.mark.parametrize("view", [0, 1, 2])
def test_grid_mouth_box_is_what_the_view_shows(shared_data, view):
    """V and F cut to the fixed mouth box: the same as cropping the picture by hand, whatever the view."""
    name = "bbaf2n"
    clip = Clip(name, shared_data / f"grid/clips/{name}.mp4", 0.5, 1.5, {})
    boxed = DataConfig(frames=4, size=96, center_crop=1.0, crop_min=1.0, color_jitter=0, crop_box="115,165,211,261")
    whole = DataConfig(frames=4, size=288, center_crop=1.0, crop_min=1.0, color_jitter=0)
    middle = replace(draw_view(name, view, whole), center=(0.5, 0.5))
    small = read_clip(clip, draw_view(name, view, boxed), ("video", "flow"), boxed)
    large = read_clip(clip, middle, ("video",), whole)
    left = 115 - (360 - 288) // 2
    assert (small["video"].array == large["video"].array[:, :, 165:261, left : left + 96]).all()
    assert small["flow"].state == PRESENT
