"""One clock for all modalities: numbers drawn into frames come out exactly where they were asked for, in V and in F."""

from fractions import Fraction

import cv2
import numpy as np
import pytest
from karmma.data import flow as module
from karmma.data.annotations import Clip
from karmma.data.config import DataConfig
from karmma.data.modality import PRESENT
from karmma.data.raw import read_clip
from karmma.data.views import draw_view, view_times

DATA = DataConfig(frames=16, size=64, flow_size=64, center_crop=1.0, crop_min=1.0, color_jitter=0, flow_step_s=0.05)
VARIABLE = np.cumsum([0, *(0.02, 0.041, 0.017, 0.1, 0.033) * 40]).tolist()
STARTS = {
    "24": [k / 24 for k in range(150)],
    "29.97": [float(Fraction(k * 1001, 30000)) for k in range(150)],
    "50": [k / 50 for k in range(200)],
    "59.94": [float(Fraction(k * 1001, 60000)) for k in range(250)],
    "variable": VARIABLE,
}


def on_display(starts, time):
    """The slow way: the last frame that starts at or before a moment, the stored times being rounded a little."""
    return max((k for k, start in enumerate(starts) if start <= time + 6e-4), default=0)


@pytest.mark.parametrize("rate", STARTS)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("view_index", [0, 1])
def test_video_shows_the_frames_on_display_and_flow_their_pairs(film, number_in, monkeypatch, rate, name, view_index):
    starts = STARTS[rate]
    path = film(name, starts)
    pairs = []

    def watch(one, two):
        pairs.append((number_in(one[..., None]), number_in(two[..., None])))
        return np.zeros((*one.shape, 2), np.float32)

    method = module.flow_method(DATA)
    monkeypatch.setattr(module, "flow_method", lambda data: type(method)("grey", watch))
    starts = [round(start, 3) for start in starts] if name == "a.mkv" else starts  # Matroska keeps milliseconds
    span = (starts[9] + 0.003, starts[-20] + 0.003)
    view = draw_view(rate, view_index, DATA)
    found = read_clip(Clip("a", path, *span, {}), view, ("video", "flow"), DATA)
    assert {reading.state for reading in found.values()} == {PRESENT}, found
    times = view_times(view, *span)
    assert [number_in(picture.transpose(1, 2, 0)) for picture in found["video"].array] == [
        on_display(starts, time) for time in times
    ]
    expected = []
    for time in times:
        ends = (time, time + 0.05) if time + 0.05 < span[1] else (time - 0.05, time)
        first, second = (on_display(starts, end) for end in ends)
        pair = (first, second + 1 if second == first else second)
        if pair not in expected:  # moments that share their pair share its flow
            expected.append(pair)
    assert pairs == expected


@pytest.mark.parametrize(("video_fps", "flow_fps"), [(60.0, 30.0), (50.0, 50.0)])
def test_released_flow_is_mapped_by_its_own_rate(tmp_path, numbered, number_in, video_fps, flow_fps):
    n_frames = 240
    for folder, rate in (("rgb", video_fps), ("flow/u", flow_fps), ("flow/v", flow_fps)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(1, round(n_frames * rate / video_fps) + 1):
            picture = numbered(number) if folder == "rgb" else numbered(number)[..., 0]
            cv2.imwrite(str(tmp_path / folder / f"frame_{number:010d}.jpg"), picture)
    data = DataConfig(**{**DATA.model_dump(), "flow_method": "released"})
    rates = {"video": video_fps, "flow": flow_fps}
    clip = Clip("a", tmp_path / "rgb", 0.5, 3.9, {"flow": tmp_path / "flow"}, "a", rates)
    view = draw_view("a", 1, data)
    found = read_clip(clip, view, ("video", "flow"), data)
    shown = [number_in(picture.transpose(1, 2, 0)) for picture in found["video"].array]
    assert shown == [int(time * video_fps) + 1 for time in view_times(view, 0.5, 3.9)]
    mapped = [number_in(picture[:1].transpose(1, 2, 0)) for picture in found["flow"].array]
    assert mapped == [(number - 1) // round(video_fps / flow_fps) + 1 for number in shown]
