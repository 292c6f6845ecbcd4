"""Neighbouring clips in one pass: each comes out as it does alone, whatever happens to the others."""

import numpy as np
import pytest
from karmma.data import pictures as module
from karmma.data.annotations import Clip
from karmma.data.config import DataConfig
from karmma.data.media import Media
from karmma.data.modality import FAILED, PRESENT
from karmma.data.raw import read_clip, read_clips
from karmma.data.views import draw_view

DATA = DataConfig(frames=4, size=32, flow_size=64, center_crop=1.0)
NAMES = ("video", "flow", "audio")
TIMES = [k / 25 for k in range(250)]
SPANS = [(6.0, 7.0), (0.0, 1.0), (0.5, 1.5), (0.5, 1.5), (1.5, 2.0), (8.0, 10.0), (9.9, 10.0)]


@pytest.fixture
def long(film):
    """Ten seconds, a number in each frame, a key frame every 12 frames, with sound."""
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 160_000).astype(np.float32)
    return film("long.mp4", TIMES, sound=sound)


def clips_of(path, spans=SPANS):
    return [Clip(f"c{at}", path, start, stop, {}) for at, (start, stop) in enumerate(spans)]


def views_of(clips, index=0):
    return [draw_view(clip.clip_id, index, DATA) for clip in clips]


def equal(one, other):
    return one.state == other.state and one.reason == other.reason and np.array_equal(one.array, other.array)


@pytest.mark.parametrize("index", [0, 1])
def test_clips_together_equal_each_alone(long, index):
    clips = clips_of(long)
    views = views_of(clips, index)
    together = read_clips(clips, views, [NAMES] * len(clips), DATA)
    for clip, view, found in zip(clips, views, together, strict=True):
        alone = read_clip(clip, view, NAMES, DATA)
        assert all(reading.state == PRESENT for reading in found.values())
        assert all(equal(found[name], alone[name]) for name in NAMES), clip


def test_clips_with_different_modalities_get_what_each_asks_for(long):
    clips = clips_of(long)[:3]
    asked = [("flow",), ("audio", "video"), ()]
    found = read_clips(clips, views_of(clips), asked, DATA)
    assert [tuple(readings) for readings in found] == asked


def test_neighbours_are_decoded_once_and_far_ones_are_sought(long, monkeypatch):
    decoded = []
    whole = Media.frames

    def watch(self, from_s):
        for frame in whole(self, from_s):
            decoded.append(frame.time)
            yield frame

    monkeypatch.setattr(Media, "frames", watch)
    clips = clips_of(long)
    read_clips(clips, views_of(clips), [("video",)] * len(clips), DATA)
    assert len(decoded) == len(set(decoded))
    assert not any(2.5 < time < 5.5 for time in decoded)  # nothing of the gap between the clips
    assert len(decoded) < 170  # of 250: 5.5 s of clips, and up to a key frame before each run of them


def test_clip_beyond_the_end_fails_alone(long):
    clips = clips_of(long, [(0.0, 1.0), (9.5, 11.0), (0.5, 1.0)])
    found = read_clips(clips, views_of(clips), [("video", "flow")] * 3, DATA)
    assert [[reading.state for reading in readings.values()] for readings in found] == [
        [PRESENT, PRESENT], [FAILED, FAILED], [PRESENT, PRESENT],
    ]  # fmt: skip
    assert "the video ends at 10.000 s" in found[1]["video"].reason


def test_film_of_one_frame_has_video_and_no_flow(film):
    clips = clips_of(film("one.mp4", [0.0]), [(0.0, 0.04)])
    found = read_clips(clips, views_of(clips), [("video", "flow")], DATA)[0]
    assert (found["video"].state, found["flow"].state) == (PRESENT, FAILED)
    assert "one frame only" in found["flow"].reason


def test_damaged_frame_fails_only_the_clips_that_show_it(film):
    noise = [np.random.default_rng(k).integers(0, 255, (64, 64, 3), np.uint8) for k in range(100)]
    path = film("noise.mkv", TIMES[:100], noise)
    content = bytearray(path.read_bytes())
    middle = int(len(content) * 0.45)
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    clips = clips_of(path, [(0.0, 1.0), (1.5, 2.2), (3.0, 4.0)])
    found = read_clips(clips, views_of(clips), [("video",)] * 3, DATA)
    assert [readings["video"].state for readings in found] == [PRESENT, FAILED, PRESENT]
    for clip, view, readings in zip(clips, views_of(clips), found, strict=True):
        assert equal(readings["video"], read_clip(clip, view, ("video",), DATA)["video"])


def test_passes_are_cut_where_seeking_pays(long):
    clips = clips_of(long)
    asked = [module.Asked(("video",), np.array([c.start_s, c.stop_s]), c.stop_s, None) for c in clips]
    with Media(long) as media:
        assert list(module._passes(media, asked)) == [[1, 2, 3, 4], [0], [5, 6]]
