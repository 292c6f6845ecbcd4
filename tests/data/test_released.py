"""Released flow: u and v as they were released, mapped by their own rate, mirrored with the view."""

import csv

import cv2
import h5py
import numpy as np
import pytest
from karmma.data.annotations import Clip
from karmma.data.config import DataConfig
from karmma.data.errors import MediaError
from karmma.data.modality import FAILED, PRESENT
from karmma.data.raw import read_clip
from karmma.data.released import read_released, released_picture
from karmma.data.views import View, draw_view

DATA = DataConfig(frames=4, size=32, center_crop=1.0, flow_method="released")
WHOLE = View(0, (0.5,), 1.0, (0.5, 0.5), False)
MIRRORED = View(1, (0.5,), 1.0, (0.5, 0.5), True)


@pytest.mark.parametrize(
    ("u", "v", "levels"),
    [
        (128, 128, [128, 128, 0]),
        (131, 132, [131, 132, 5]),
        (0, 255, [0, 255, 180]),
    ],
)
def test_levels_stay_as_released_and_magnitude_has_the_same_scale(u, v, levels):
    field = np.full((8, 8, 2), (u, v), np.uint8)
    assert released_picture(field, WHOLE, 8)[:, 3, 3].tolist() == levels


def test_mirrored_view_turns_u_into_256_minus_u():
    field = np.random.default_rng(0).integers(1, 256, (16, 16, 2)).astype(np.uint8)
    plain, mirrored = (released_picture(field, view, 16).astype(int) for view in (WHOLE, MIRRORED))
    assert (mirrored[0] == 256 - plain[0][:, ::-1]).all()
    assert (mirrored[1:] == plain[1:, :, ::-1]).all()
    assert released_picture(np.zeros((8, 8, 2), np.uint8), MIRRORED, 8)[0].max() == 255  # 256 does not fit


def test_crop_box_is_in_pixels_of_the_flow_pictures():
    field = np.full((16, 24, 2), 128, np.uint8)
    field[4:8, 10:14, 0] = 200
    boxed = View(0, (0.5,), 1.0, (0.5, 0.5), False, (10, 4, 14, 8))
    assert (released_picture(field, boxed, 4)[0] == 200).all()


@pytest.fixture
def flow(tmp_path):
    """Return a function that writes u and v pictures of given numbers."""

    def write(u_numbers, v_numbers, shape=(32, 32)):
        for name, numbers in (("u", u_numbers), ("v", v_numbers)):
            (tmp_path / "flow" / name).mkdir(parents=True)
            for number in numbers:
                picture = np.full(shape if name == "u" else (32, 32), 100 + number, np.uint8)
                cv2.imwrite(str(tmp_path / f"flow/{name}/frame_{number:010d}.jpg"), picture)
        return tmp_path / "flow"

    return write


def test_each_time_gets_the_flow_of_its_moment(flow):
    path = flow(range(1, 31), range(1, 31))
    times = np.array([0.0, 0.34, 0.98, 2.95])
    found = read_released(path, 10.0, times, WHOLE, DATA)
    assert found.shape == (4, 3, 32, 32)
    assert found[:, 0, 5, 5].tolist() == pytest.approx([101, 104, 110, 130], abs=1)


def test_pack_of_u_and_v_gives_what_their_folders_give(flow, tmp_path):
    path = flow(range(1, 31), range(1, 31))
    with h5py.File(tmp_path / "flow.h5", "w") as file:
        for name in ("u", "v"):
            group = file.create_group(f"P01/P01_06/{name}")
            for picture in sorted((path / name).iterdir()):
                group[picture.stem] = np.frombuffer(picture.read_bytes(), np.uint8)
    times = np.array([0.0, 0.34, 0.98, 2.95])
    packed = read_released(tmp_path / "flow.h5::P01/P01_06", 10.0, times, MIRRORED, DATA)
    assert (packed == read_released(path, 10.0, times, MIRRORED, DATA)).all()


@pytest.mark.parametrize(
    ("u", "v", "shape", "message"),
    [
        (range(1, 31), range(1, 21), (32, 32), r"flow/v: frame at 2\.500 s wanted, decoding breaks off"),
        (range(1, 31), (), (32, 32), "flow/v: holds no numbered pictures"),
        (range(1, 31), range(1, 31), (16, 32), "u and v differ in number or size"),
    ],
)
def test_u_and_v_that_do_not_match_fail(flow, u, v, shape, message):
    with pytest.raises(MediaError, match=message):
        read_released(flow(u, v, shape), 10.0, np.array([0.5, 2.5]), WHOLE, DATA)


def test_clip_without_named_flow_fails_and_says_what_to_set(film):
    path = film("a.mp4", [k / 25 for k in range(25)])
    reading = read_clip(Clip("a", path, 0.0, 1.0, {}), draw_view("a", 0, DATA), ("flow",), DATA)["flow"]
    assert reading.state == FAILED
    assert "Set flow_files" in reading.reason


@pytest.mark.parametrize(
    ("narration", "start_s", "stop_s"), [("P01_06_90", 341.40, 342.22), ("P01_06_92", 344.05, 345.0)]
)
def test_real_clips_have_video_and_flow_of_the_frames_that_the_table_pairs(shared_data, narration, start_s, stop_s):
    """The flow of a segment ends one frame short, and is present all the same."""
    epic = shared_data / "epic"
    data = DataConfig(frames=32, size=64, flow_method="released")
    rates = {"video": 60, "flow": 30}
    clip = Clip(narration, epic / "rgb_frames/P01/P01_06", start_s, stop_s, {"flow": epic / "flow_frames/P01/P01_06"},
                "P01_06", rates)  # fmt: skip
    view = draw_view(narration, 0, data)
    found = read_clip(clip, view, ("video", "flow"), data)
    assert [found[name].state for name in ("video", "flow")] == [PRESENT, PRESENT], found
    with open(epic / "frames.csv", newline="", encoding="utf-8") as file:
        rows = {int(row["rgb_index"]): row for row in csv.DictReader(file) if row["narration_id"] == narration}
    for step in (0, 7, 15, 30):
        time = start_s + (step + 0.5) * (stop_s - start_s) / 32
        row = rows[int(time * 60 + 0.04) + 1]
        u, v = (cv2.imread(str(epic / row[f"flow_{part}"]), cv2.IMREAD_GRAYSCALE) for part in "uv")
        expected = released_picture(np.dstack([u, v]), view, 64)
        assert np.abs(found["flow"].array[step].astype(int) - expected).mean() < 1


@pytest.mark.parametrize(("start_s", "stop_s", "lag_s"), [(344.1, 344.9, 3 / 60), (341.46, 342.16, 2 / 60)])
def test_sign_of_released_flow_is_that_of_flow_computed_from_the_frames(shared_data, start_s, stop_s, lag_s):
    """Medians over the picture go up and down together; the release fits motion 2 to 3 RGB frames earlier best."""
    epic, medians = shared_data / "epic", []
    for method, span in (("released", (start_s, stop_s)), ("dis", (start_s - lag_s, stop_s - lag_s))):
        data = DataConfig(frames=28, size=64, flow_method=method, flow_step_s=1 / 30)
        sources = {"flow": epic / "flow_frames/P01/P01_06"} if method == "released" else {}
        clip = Clip("a", epic / "rgb_frames/P01/P01_06", *span, sources, "P01_06", {"video": 60, "flow": 30})
        reading = read_clip(clip, draw_view("a", 0, data), ("flow",), data)["flow"]
        assert reading.state == PRESENT, reading.reason
        medians.append(np.median(reading.array[:, :2].astype(float) - 128, axis=(2, 3)))
    for channel in (0, 1):
        assert np.corrcoef(medians[0][:, channel], medians[1][:, channel])[0, 1] > 0.85
