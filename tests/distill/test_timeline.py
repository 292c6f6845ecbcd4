"""Timelines: windows that cover a film, each predicted as the clip that it is; rows and captions made of them."""

import csv
import itertools

import karmma
import numpy as np
import pytest
from karmma.data.errors import ConfigError, MediaError
from karmma.distill.prediction import Prediction
from karmma.distill.timeline import captions, windows, write_timeline

CLASSES = {"verb": ("open", "close"), "noun": ("door", "box, small", "lid")}


def said(start_s, stop_s, verb=0.75, noun=(0.5, 0.3, 0.2)):
    probs = {"verb": np.array([verb, 1 - verb], np.float32), "noun": np.array(noun, np.float32)}
    return Prediction("film.mp4", start_s, stop_s, probs, CLASSES, ("video", "audio"))


@pytest.mark.parametrize(
    ("length", "window", "stride", "wanted"),
    [
        (5.0, 2.0, 1.0, [(0, 2), (1, 3), (2, 4), (3, 5)]),
        (5.5, 2.0, 1.0, [(0, 2), (1, 3), (2, 4), (3, 5), (3.5, 5.5)]),
        (6.0, 2.0, 2.0, [(0, 2), (2, 4), (4, 6)]),
        (2.0, 2.0, 1.0, [(0, 2)]),
        (1.5, 2.0, 1.0, [(0, 1.5)]),
        (2.2, 2.0, 1.0, [(0, 2), (0.2, 2.2)]),
        (10.0, 1.0, 4.0, [(0, 1), (4, 5), (8, 9), (9, 10)]),
        (0.30000000000000004, 0.1, 0.1, [(0, 0.1), (0.1, 0.2), (0.2, 0.3)]),
    ],
)
def test_windows_by_hand(length, window, stride, wanted):
    found = windows(length, window, stride)
    assert len(found) == len(wanted)
    assert np.array(found) == pytest.approx(np.array(wanted, float))


def test_windows_cover_the_film_and_stay_within_it():
    draw = np.random.default_rng(0)
    for length, window, share in zip(
        draw.uniform(0.1, 60, 300), draw.uniform(0.1, 8, 300), draw.uniform(0.05, 1, 300), strict=True
    ):
        found = windows(length, window, window * share)
        assert found[0][0] == 0
        assert found[-1][1] == pytest.approx(length)
        assert all(0 <= start < stop <= length + 1e-9 for start, stop in found)
        assert all(one[0] < other[0] <= one[1] for one, other in itertools.pairwise(found))
        assert all(stop - start == pytest.approx(min(window, length), abs=1e-3) for start, stop in found)


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (-1, 1), (1, 0), (1, -2), (float("nan"), 1), (1, float("inf"))])
def test_windows_of_no_length_are_refused(window, stride):
    with pytest.raises(ConfigError, match=r"expected seconds above 0"):
        windows(10.0, window, stride)


def test_a_million_windows_are_refused():
    with pytest.raises(ConfigError, match="more than a million windows"):
        windows(3600.0, 1.0, 1e-3)


def test_each_window_is_predicted_as_the_clip_with_its_times(student_run, sample):
    predictor = karmma.load(student_run, "cpu")
    video, boxes = sample / "videos/clip_0001.mp4", {"detections": sample / "boxes/clip_0001.json"}
    found = list(predictor.timeline(video, 0.5, 0.25, files=boxes))
    assert len(found) == 5
    for at, one in enumerate(found):
        assert (one.start_s, one.stop_s) == pytest.approx((0.25 * at, 0.25 * at + 0.5))
        alone = predictor.predict(video, start_s=one.start_s, stop_s=one.stop_s, files=boxes)
        assert one.present == alone.present
        for head in alone:
            assert np.abs(one[head] - alone[head]).max() < 1e-5
    assert np.abs(found[0]["verb"] - found[-1]["verb"]).max() > 1e-4
    assert len(list(predictor.timeline(video, 0.5))) == 3  # one after the other
    with pytest.raises(ConfigError):
        next(predictor.timeline(video, 0.5, 0.0))


def test_window_that_fails_ends_a_timeline_by_name(student_run, sample, tmp_path):
    predictor = karmma.load(student_run, "cpu")
    data = (sample / "videos/clip_0001.mp4").read_bytes()
    (tmp_path / "bad.mp4").write_bytes(data[:-2000] if data.find(b"moov") < 1000 else data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"bad\.mp4"):
        list(predictor.timeline(tmp_path / "bad.mp4", 0.5))


def test_csv_has_a_row_a_window_and_the_likeliest_first(tmp_path):
    write_timeline(tmp_path / "t.csv", [said(0, 2), said(1, None, 0.125, (0.1, 0.6, 0.3))], 2)
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["file", "start_s", "stop_s", "modalities"]
    assert list(rows[0])[4:8] == ["verb_1", "verb_1_prob", "verb_2", "verb_2_prob"]
    assert {**rows[0]} | {"action_1": "open + door", "action_1_prob": "0.3750", "noun_2": "box, small"} == rows[0]
    assert (rows[1]["start_s"], rows[1]["stop_s"], rows[1]["modalities"]) == ("1.000", "", "V+A")
    assert (rows[1]["verb_1"], rows[1]["verb_1_prob"]) == ("close", "0.8750")
    assert (rows[1]["action_1"], rows[1]["action_2"]) == ("close + box, small", "close + lid")
    assert "verb_3" not in rows[0]


def test_csv_has_no_more_columns_than_classes(tmp_path):
    write_timeline(tmp_path / "t.csv", [said(0, 2)], 50)
    header = (tmp_path / "t.csv").read_text().splitlines()[0].split(",")
    assert [sum(name.startswith(f"{head}_") for name in header) for head in ("verb", "noun", "action")] == [4, 6, 12]


@pytest.mark.parametrize("spans", [[(0, 2), (1, 3), (2, 4), (2.5, 4.5)], [(0, 1), (4, 5), (8, 9)], [(0, 3)]])
def test_caption_is_that_of_the_window_whose_middle_is_nearest(spans):
    found = captions([said(*span, verb=0.51 + 0.1 * at) for at, span in enumerate(spans)])
    assert all(one.stop_s <= other.start_s for one, other in itertools.pairwise(found))
    for time in np.arange(0.005, 10, 0.01):
        shown = [caption for caption in found if caption.start_s <= time < caption.stop_s]
        inside = [at for at, (start, stop) in enumerate(spans) if start <= time < stop]
        if not inside:
            assert shown == []
            continue
        nearest = min(inside, key=lambda at: abs(time - sum(spans[at]) / 2))
        assert [caption.lines[0] for caption in shown] == [f"verb: open {0.51 + 0.1 * nearest:.0%}"]
        assert shown[0].lines[1:] == ("noun: door 50%", "V+A")


def test_caption_of_a_whole_film_has_no_end():
    (found,) = captions([said(0.0, None)])
    assert (found.start_s, found.stop_s) == (0.0, float("inf"))
