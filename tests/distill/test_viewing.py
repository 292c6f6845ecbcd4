"""Pictures of what a student is given: nothing that is not in the arrays, and the right way up."""

import base64

import cv2
import numpy as np
import pytest
from karmma.data.audio import segment_hops
from karmma.data.config import DataConfig
from karmma.distill import page, viewing

SOUND = DataConfig(frames=4, audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32)


def strength(colours):
    """How far colours are from white, 0..255."""
    return 255 - colours.min(axis=-1).astype(int)


def flow_of(right, down):
    """One field, uint8 [1, 3, 1, n], of motions in levels."""
    motion = np.stack([np.asarray(right), np.asarray(down)]) + 128
    return np.concatenate([motion, np.zeros_like(motion[:1])])[None, :, None].astype(np.uint8)


def test_address_holds_every_pixel():
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    for wanted, how in ((picture, cv2.IMREAD_COLOR), (picture[..., 0], cv2.IMREAD_GRAYSCALE)):
        head, _, text = viewing.address(wanted).partition(",")
        found = cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), how)
        assert head == "data:image/png;base64"
        assert np.array_equal(found[..., ::-1] if found.ndim == 3 else found, wanted)


def test_frames_are_the_array_with_its_channels_last():
    video = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    first, second = viewing.frames(video)
    assert first.shape == (4, 5, 3)
    assert second[3, 4, 2] == video[1, 2, 3, 4]


@pytest.mark.parametrize("angle", np.linspace(0, 2 * np.pi, 9)[:-1])
def test_flow_is_the_stronger_the_faster_and_white_where_nothing_moves(angle):
    speeds = np.arange(0, 100, 4)
    flow = flow_of(np.rint(speeds * np.cos(angle)), np.rint(speeds * np.sin(angle)))
    strengths = strength(viewing.flow_colours(flow, 127.0))[0, 0]
    assert strengths[0] == 0
    assert (np.diff(strengths) > 0).all()
    assert strength(viewing.flow_colours(flow, 40.0))[0, 0].max() == 255


def test_flow_colours_by_hand():
    flow = flow_of([127, 0, -127], [0, -127, 0])  # to the right, up, to the left
    right, up, left = viewing.flow_colours(flow, 127.0)[0, 0].tolist()
    assert right == [255, 0, 0]
    assert up == [128, 255, 0]
    assert left == [0, 255, 255]


def test_full_colour_is_a_fast_motion_but_no_wild_pixel_and_no_noise():
    assert viewing.fast(flow_of([30] * 200 + [120], [40] * 200 + [0])) == 50
    assert viewing.fast(flow_of([1, 0], [0, -1])) == 8


def test_wheel_shows_each_direction_on_its_own_side():
    wheel, middle = viewing.flow_wheel(), viewing.WHEEL_SIDE // 2
    assert wheel[middle, middle].tolist() == [255, 255, 255]
    assert wheel[middle, -1].tolist() == [255, 0, 0]
    assert wheel[0, middle].tolist() == [128, 255, 0]  # upwards


def test_spectrogram_has_low_tones_at_the_bottom_and_time_to_the_right():
    segments = np.full((4, 24, 32), -3.0, np.float32)
    segments[:, 2], segments[3] = 0.0, segments[3] + 1
    times = np.array([0.5, 1.5, 2.5, 3.5])
    heard = viewing.sound(segments, times, SOUND)
    assert len(heard) == 4
    light = heard[0].picture.sum(-1, dtype=int)  # [mels, steps]
    assert light.shape == (24, 32)
    assert light.argmax(axis=0).tolist() == [24 - 1 - 2] * 32
    assert heard[3].picture[0, 0].sum(dtype=int) > heard[0].picture[0, 0].sum(dtype=int)
    assert [(one.start_s + one.stop_s) / 2 for one in heard] == pytest.approx(times, abs=128 / 16000)
    assert [one.ticks(viewing.step_s(heard))[0][1] for one in heard] == [0.5] * 4


def test_segments_that_overlap_are_drawn_once_and_every_step_is_there():
    times = np.array([0.2, 0.3, 0.4, 3.0])
    hops = segment_hops(times, SOUND)
    # A sound that says at each moment which moment it is.
    segments = np.repeat(hops[:, None].astype(np.float32) / 100, 24, axis=1)
    first, last = viewing.sound(segments, times, SOUND)
    assert first.picture.shape[1] == hops[2, -1] - hops[0, 0] + 1
    assert last.picture.shape[1] == 32
    light = first.picture[0].sum(-1, dtype=int)
    assert (np.diff(light) >= 0).all()
    assert first.start_s == pytest.approx((hops[0, 0] - 0.5) * 128 / 16000)


def test_silence_does_not_hide_the_rest():
    segments = np.full((1, 24, 32), -10.0, np.float32)
    segments[0, :, 16:] = -1 - np.arange(24)[:, None] / 24
    assert viewing.loudness(segments) == (-7.0, -1.0)
    data = SOUND.model_copy(update={"frames": 2})
    (one,) = viewing.sound(segments, np.array([0.5]), data)
    assert one.picture[:, :16].max() <= 4  # black, but for a trace of blue
    assert len(np.unique(one.picture[:, 20].sum(-1, dtype=int))) > 5
    assert viewing.sound(np.full((1, 24, 32), -10.0, np.float32), np.array([0.5]), data)[0].picture.max() <= 4


def test_ticks_in_hz_and_seconds_stand_where_they_belong():
    tones = dict(viewing.tones(DataConfig()))
    assert list(tones) == ["100 Hz", "500 Hz", "1 kHz", "2 kHz", "4 kHz"]
    # Slaney's mels up to 8000 Hz are 45.245; 1000 Hz is the 15th: a third of the height.
    assert tones["1 kHz"] == pytest.approx(15 / 45.245, abs=0.01)
    one = viewing.Heard(np.zeros((1, 1, 3), np.uint8), -0.1, 1.9)
    assert viewing.step_s([one]) == 0.5
    assert one.ticks(0.5) == [("0.0 s", pytest.approx(0.05)), ("0.5 s", pytest.approx(0.3)),
                              ("1.0 s", pytest.approx(0.55)), ("1.5 s", pytest.approx(0.8))]  # fmt: skip


def test_boxes_are_those_of_the_rows_that_hold_one():
    rows = np.zeros((2, 3, 6), np.float32)
    rows[1, 0], rows[1, 2] = (0.25, 0.5, 0.75, 1.0, 0.5, 1), (0, 0, 0.5, 0.25, 1, 2)
    none, two = viewing.boxes(rows)
    assert none == []
    assert two == [viewing.Box(0.25, 0.5, 0.5, 0.5, 0.5, "hand"), viewing.Box(0, 0, 0.5, 0.25, 1, "object")]


def test_messages_are_text():
    assert "<b>" not in page.error("<b>no</b>")
    assert "&lt;b&gt;" in page.error("<b>no</b>")
