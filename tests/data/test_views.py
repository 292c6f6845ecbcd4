import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from karmma.data.config import DataConfig
from karmma.data.views import View, crop, crop_square, draw_view, view_times

DATA = DataConfig(frames=6, crop_min=0.5, flip=True)


def test_view_zero_is_clean():
    assert draw_view("a", 0, DATA) == View(0, (0.5,) * 6, 0.875, (0.5, 0.5), False)


def test_view_times_of_the_clean_view_are_the_middles_of_equal_spans():
    view = draw_view("a", 0, DataConfig(frames=4))
    assert view_times(view, 1.0, 3.0).tolist() == [1.25, 1.75, 2.25, 2.75]


def test_view_times_by_hand():
    view = View(1, (0.0, 0.5, 0.75), 1.0, (0.5, 0.5), False)
    assert view_times(view, 10.0, 16.0).tolist() == [10.0, 13.0, 15.5]


def test_draw_view_gives_the_same_in_another_process_and_order():
    ask = "from karmma.data.config import DataConfig; from karmma.data.views import draw_view; "
    ask += "d = DataConfig(frames=6, crop_min=0.5, flip=True); draw_view('z', 9, d); print(draw_view('clip 1', 3, d))"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout
    draw_view("other", 1, DATA)
    assert said.strip() == str(draw_view("clip 1", 3, DATA))


def test_draw_view_gives_these_numbers_for_ever():
    # A cache holds what these numbers selected: whoever changes them has to raise identity.PREPROCESSING.
    view = draw_view("a", 1, DataConfig(frames=2))
    numbers = [round(x, 6) for x in (*view.offsets, view.scale, *view.center)]
    assert numbers == [0.408082, 0.100674, 0.905734, 0.148119, 0.910558]


def test_draw_view_differs_by_clip_view_and_seed():
    other = DATA.model_copy(update={"view_seed": 1})
    views = [draw_view("a", 1, DATA), draw_view("b", 1, DATA), draw_view("a", 2, DATA), draw_view("a", 1, other)]
    assert len({view.offsets for view in views}) == len({view.center for view in views}) == 4
    # The parts of a seed are not simply joined: clip "1/a" in view 1 is not clip "a" in view "1/1".
    assert draw_view("1/a", 1, DATA) != draw_view("a", 1, DATA)


def test_draw_view_keeps_its_crop_when_the_number_of_frames_changes():
    longer = draw_view("a", 1, DATA.model_copy(update={"frames": 9}))
    view = draw_view("a", 1, DATA)
    assert (longer.scale, longer.center, longer.flip) == (view.scale, view.center, view.flip)
    assert longer.offsets[:6] == view.offsets


def test_draw_view_covers_its_ranges_evenly():
    views = [draw_view(f"clip {i}", 1, DATA) for i in range(2000)]
    offsets = np.array([view.offsets for view in views])
    scales = np.array([view.scale for view in views])
    centers = np.array([view.center for view in views])
    assert 0 <= offsets.min() < 0.01
    assert 0.99 < offsets.max() < 1
    assert 0.5 <= scales.min() < 0.51
    assert 0.99 < scales.max() < 1
    assert np.abs(np.histogram(centers, 10, (0, 1))[0] - 400).max() < 100
    assert 900 < sum(view.flip for view in views) < 1100


def test_draw_view_never_flips_unless_asked():
    data = DATA.model_copy(update={"flip": False})
    assert not any(draw_view(f"{i}", 1, data).flip for i in range(50))


def test_draw_view_refuses_a_negative_view():
    with pytest.raises(ValueError, match="view = -1"):
        draw_view("a", -1, DATA)


@pytest.mark.parametrize(
    ("scale", "center", "box"),
    [
        (1.0, (0.5, 0.5), (20, 0, 60)),
        (0.5, (0.0, 0.0), (0, 0, 30)),
        (0.5, (1.0, 1.0), (70, 30, 30)),
        (0.5, (0.5, 0.2), (35, 6, 30)),
    ],
)
def test_crop_square_by_hand(scale, center, box):
    assert crop_square(100, 60, View(1, (), scale, center, False)) == box


def test_crop_square_stays_inside_every_picture():
    for i in range(200):
        width, height = 1 + i * 7 % 50, 1 + i * 11 % 40
        left, top, side = crop_square(width, height, draw_view(f"{i}", 1, DATA))
        assert 0 <= left <= width - side
        assert 0 <= top <= height - side
        assert side >= 1


def test_crop_averages_when_it_shrinks():
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[::2, ::2] = 200  # one pixel in each block of four
    view = View(1, (), 1.0, (0.5, 0.5), False)
    assert (crop(picture, view, 2) == 50).all()


def test_crop_of_the_same_size_is_the_picture_itself():
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    view = View(1, (), 1.0, (1.0, 0.5), False)
    assert (crop(picture, view, 5) == picture[:, 2:]).all()
    assert (crop(picture, replace(view, scale=0.6, center=(0.0, 1.0)), 3) == picture[2:, :3]).all()


def test_draw_view_augments_color_and_sound_within_the_settings_and_never_view_zero():
    data = DataConfig(frames=2, color_jitter=0.3, audio_mask=0.2)
    views = [draw_view(f"clip {i}", 1, data) for i in range(500)]
    factors = np.array([view.color for view in views])
    assert 0.7 <= factors.min() < 0.72
    assert 1.28 < factors.max() <= 1.3
    for spans in (np.array([view.masked_mels for view in views]), np.array([view.masked_time for view in views])):
        assert spans.min() >= 0
        assert spans.sum(axis=1).max() <= 1
        assert 0.19 < spans[:, 1].max() <= 0.2
    clean = draw_view("clip 0", 0, data)
    assert (clean.color, clean.masked_mels, clean.masked_time) == ((1, 1, 1), (0, 0), (0, 0))


def test_crop_box_moves_every_crop_into_the_box():
    data = DataConfig(frames=2, crop_box="115,165,211,261", center_crop=1.0)
    assert data.crop_box == (115, 165, 211, 261)
    assert crop_square(360, 288, draw_view("a", 0, data)) == (115, 165, 96)
    for index in range(1, 50):
        left, top, side = crop_square(360, 288, draw_view("a", index, data))
        assert 115 <= left <= left + side <= 211
        assert 165 <= top <= top + side <= 261


@pytest.mark.parametrize("text", ["1,2,3", "5,5,5,9", "-1,0,5,5", "a,b,c,d"])
def test_crop_box_that_is_no_box_is_refused(text):
    with pytest.raises(ValueError, match="crop_box"):
        DataConfig(crop_box=text)
