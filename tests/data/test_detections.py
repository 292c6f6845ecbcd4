import json

import numpy as np
import pytest
from karmma.data import detections as module
from karmma.data.detections import has_boxes, place_boxes, read_boxes
from karmma.data.errors import MediaError
from karmma.data.views import View

WHOLE = View(0, (0.5,), 1.0, (0.5, 0.5), False)


def label(x1, y1, x2, y2, kind="0000", **more):
    return {"box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2}, "standard_category": kind, **more}


@pytest.fixture
def boxes(tmp_path):
    def write(content, names=("a",)):
        path = tmp_path / "boxes.json"
        path.write_text(json.dumps(content))
        return read_boxes(path, names)

    return write


def placed(found, times, view=WHOLE, max_boxes=3):
    def asked():
        raise AssertionError("the file says its size")

    return place_boxes(found, np.array(times), view, max_boxes, asked)


def test_place_boxes_by_hand(boxes):
    found = boxes({"fps": 10, "width": 100, "height": 100, "frames": [{"labels": [label(10, 20, 50, 100, "hand")]}]})
    out = placed(found, [0.05])
    assert out.shape == (1, 3, 6)
    assert out.dtype == np.float32
    assert out[0, 0] == pytest.approx([0.1, 0.2, 0.5, 1.0, 1.0, 1])
    assert (out[0, 1:] == 0).all()


def test_place_boxes_takes_the_frame_on_display(boxes):
    frames = [{"labels": [label(k, 0, 100, 100)]} for k in range(5)]
    found = boxes({"fps": 10, "width": 100, "height": 100, "frames": frames})
    out = placed(found, [0.0, 0.099, 0.1, 0.3, 0.45, 0.7])
    assert out[:, 0, 0] == pytest.approx([0.00, 0.00, 0.01, 0.03, 0.04, 0.0])
    assert out[:, 0, 5].tolist() == [2, 2, 2, 2, 2, 0]  # none after the last annotated frame


def test_place_boxes_keeps_the_best_scores(boxes):
    scores = [0.2, 0.9, 0.5, 0.9]
    frame = {"labels": [label(k, 0, 50, 50, score=score) for k, score in enumerate(scores)]}
    out = placed(boxes({"fps": 1, "width": 100, "height": 100, "frames": [frame]}), [0.0])
    assert out[0, :, 4] == pytest.approx([0.9, 0.9, 0.5])
    assert out[0, :, 0] == pytest.approx([0.01, 0.03, 0.02])


def test_place_boxes_follow_the_crop_and_leave_out_what_it_leaves_out(boxes):
    frame = {"labels": [label(60, 10, 80, 90), label(0, 0, 55, 20), label(70, 95, 75, 100), label(0, 0, 200, 100)]}
    found = boxes({"fps": 1, "width": 200, "height": 100, "frames": [frame]})
    view = View(1, (0.5,), 0.5, (0.4, 0.0), False)  # side 50, left 60, top 0
    out = placed(found, [0.0], view)[0]
    assert out[0] == pytest.approx([0, 0.2, 0.4, 1.0, 1, 2])
    assert out[1] == pytest.approx([0, 0, 1, 1, 1, 2])
    assert (out[2] == 0).all()


def test_place_boxes_mirrored_swap_left_and_right(boxes):
    found = boxes({"fps": 1, "width": 100, "height": 100, "frames": [{"labels": [label(10, 20, 30, 40)]}]})
    out = placed(found, [0.0], View(1, (0.5,), 1.0, (0.5, 0.5), True))
    assert out[0, 0] == pytest.approx([0.7, 0.2, 0.9, 0.4, 1, 2])


def test_official_file_has_twelve_frames_a_second_and_numbers_in_names(boxes):
    frames = [{"name": f"a/{k:04d}.jpg", "labels": [label(k, 0, 50, 50)]} for k in (3, 1)]
    found = boxes({"b": [], "a": frames})
    out = place_boxes(found, np.array([0.0, 1 / 12, 2 / 12]), WHOLE, 1, lambda: (100, 50))
    assert out[:, 0, 5].tolist() == [2, 0, 2]
    assert out[2, 0, 2] == pytest.approx(0.5, abs=0.01)


def test_a_list_of_frames_is_read_and_another_video_is_not_there(boxes):
    assert boxes([{"labels": [label(0, 0, 1, 1)]}]).frames[0].shape == (1, 6)
    assert boxes({"b": []}, ("a", "c")) is None


def test_has_boxes_looks_at_the_clip_only(boxes):
    frames = [{"labels": []}, {"labels": [label(0, 0, 1, 1)]}, {"labels": []}]
    found = boxes({"fps": 1, "width": 9, "height": 9, "frames": frames})
    assert [has_boxes(found, *span) for span in [(0, 3), (0, 1), (1, 2), (1.5, 1.8), (2, 3)]] == [1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"frames": [{"labels": [{"box2d": {"x1": 1}}]}]}, "not boxes in the form of Something-Else: KeyError"),
        ({"frames": [[1, 2]]}, "not boxes in the form"),
        ({"frames": [], "width": 0, "height": 4}, "expected positive numbers"),
        ({"frames": [], "fps": 0}, "fps = 0"),
        ({"frames": [], "fps": float("inf")}, "fps = inf"),
        ({"frames": [], "fps": 10**400}, "not boxes in the form of Something-Else: OverflowError"),
        ({"frames": [], "width": float("inf"), "height": 4}, "not boxes in the form of Something-Else: OverflowError"),
        ({"frames": [], "width": 10**400, "height": 4}, "expected positive numbers"),
        ([{"labels": [label(0, 0, 10**400, 1)]}], "not boxes in the form of Something-Else: OverflowError"),
        ([{"labels": [label(0, 0, 1e300, 1)]}], "beyond any picture"),
        ([{"labels": [label(0, 0, float("nan"), 1)]}], "not a finite number"),
        (3, "not boxes in the form"),
    ],
)
def test_read_boxes_of_another_form_says_so(boxes, content, reason):
    with pytest.raises(MediaError, match=r"boxes\.json: ") as caught:
        boxes(content)
    assert reason in str(caught.value)


def test_read_boxes_of_a_missing_or_broken_file_says_so(tmp_path):
    with pytest.raises(MediaError, match=r"none\.json: no such file"):
        read_boxes(tmp_path / "none.json", ("a",))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(MediaError, match=r"a\.json: cannot be read as JSON"):
        read_boxes(tmp_path / "a.json", ("a",))


def test_read_boxes_sees_a_file_that_changed(boxes):
    assert len(boxes([{"labels": []}]).frames) == 1
    assert len(boxes([{"labels": []}, {"labels": []}]).frames) == 2


def test_something_else_excerpt_reads_as_its_list_says(shared_data):
    folder = shared_data / "boxes"
    rows = [line.split(",") for line in (folder / "videos.csv").read_text().splitlines()]
    for row in rows[1:]:
        listed = dict(zip(rows[0], row, strict=False))
        found = read_boxes(folder / "annotations.json", (listed["id"],))
        assert len(found.frames) == int(listed["n_annotated"])
        assert min(found.frames) + 1 == int(listed["first_annotated"])
        assert max(found.frames) + 1 == int(listed["last_annotated"])
        assert sum(int((table[:, 5] == 1).sum()) for table in found.frames.values()) == int(listed["n_hand_boxes"])


def official(numbers):
    """Return boxes of videos in the official form: every frame has lists of its own beside the labels."""
    return {
        str(at): [
            {"labels": [label(at % 50, 10, 90, 90, "hand")], "gt_placeholders": ["a [b], c"], "name": f"{at}/0001.jpg"},
            {"name": f"{at}/0002.jpg", "labels": []},
        ]
        for at in numbers
    }


def test_file_in_parts_is_searched_for_the_video(tmp_path):
    for part, numbers in enumerate((range(0, 50), range(50, 90)), 1):
        (tmp_path / f"boxes_part{part}.json").write_text(json.dumps(official(numbers)))
    for number in (3, 49, 50, 89):
        found = read_boxes(tmp_path / "boxes_part*.json", (str(number),))
        assert found.frames[0][0, 0] == number % 50
        assert len(found.frames[1]) == 0
    assert read_boxes(tmp_path / "boxes_part*.json", ("90",)) is None
    with pytest.raises(MediaError, match=r"none\*\.json: no such files"):
        read_boxes(tmp_path / "none*.json", ("1",))
    (tmp_path / "boxes_part3.json").write_text(json.dumps(official([3])))
    with pytest.raises(MediaError, match="both have boxes of 3"):
        read_boxes(tmp_path / "boxes_part*.json", ("3",))


def test_one_video_of_many_equals_the_whole_file_parsed_and_only_it_is_parsed(tmp_path, monkeypatch):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(official(range(20_000)), indent=1))
    whole = json.loads(path.read_text())
    monkeypatch.setattr(module, "_parsed", None)
    for name in ("0", "777", "19999"):
        assert module._read_json(path, (name, "nobody")) == {name: whole[name]}


@pytest.mark.parametrize(
    "content",
    [
        {"7": [{"labels": [], "other": [1]}, {"labels": [label(1, 2, 30, 40)], "other": [2]}], "8": []},
        {"7": [{"labels": [], "more": {"deep": [[]]}}, {"labels": [label(1, 2, 30, 40)]}]},
        {"8": [], "7": [{"labels": []}, {"labels": [label(1, 2, 30, 40)]}]},
    ],
)
def test_unusual_forms_are_parsed_whole_and_come_out_the_same(boxes, content):
    found = boxes(content, ("7",))
    assert len(found.frames[0]) == 0
    assert found.frames[1][0, :4].tolist() == [1, 2, 30, 40]


def test_crop_box_shifts_and_cuts_boxes(boxes):
    frame = {"labels": [label(10, 20, 60, 40), label(70, 0, 90, 9)]}
    found = boxes({"fps": 10, "width": 100, "height": 100, "frames": [frame]})
    boxed = View(0, (0.5,), 1.0, (0.5, 0.5), False, (20, 10, 60, 50))
    out = placed(found, [0.05], boxed)
    assert out[0, 0] == pytest.approx([0, 0.25, 1, 0.75, 1, 2])
    assert (out[0, 1:] == 0).all()


def test_real_boxes_in_parts_are_those_of_the_whole_file(shared_data, tmp_path):
    whole = json.loads((shared_data / "boxes/annotations.json").read_text())
    names = sorted(whole)
    for part in range(4):
        some = {name: whole[name] for name in names[part::4]}
        (tmp_path / f"bounding_box_smthsmth_part{part + 1}.json").write_text(json.dumps(some))
    assert len(names) == 13
    without_hand = []
    for name in names:
        found = read_boxes(tmp_path / "bounding_box_smthsmth_part*.json", (name,))
        for frame in whole[name]:
            number = int(frame["name"].split("/")[1].removesuffix(".jpg")) - 1
            corners = [[box["box2d"][side] for side in ("x1", "y1", "x2", "y2")] for box in frame["labels"]]
            assert found.frames[number][:, :4].tolist() == corners
        if not any(1 in rows[:, 5] for rows in found.frames.values()):
            without_hand.append(name)
    assert without_hand == ["3201"]
