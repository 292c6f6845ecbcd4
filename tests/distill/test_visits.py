"""Visitors of a student's page: whose clip is whose, and which files stay."""

import shutil

import numpy as np
import pytest
from karmma.data.errors import MediaError
from karmma.data.modality import FAILED
from karmma.data.readers import ReaderPool
from karmma.distill import visits as visits_module
from karmma.distill.predictor import load
from karmma.distill.visits import GONE, NOTHING, Visits


@pytest.fixture
def visits(student_run):
    predictor = load(student_run, "cpu")
    with ReaderPool(1, predictor.data) as pool:
        yield Visits(predictor, pool)


@pytest.fixture
def drop(sample, tmp_path):
    """Return a function that copies a file of the sample as an upload comes: into a folder of its own."""

    def copy(name):
        path = tmp_path / name.replace("/", "-") / name.rpartition("/")[2]
        path.parent.mkdir(exist_ok=True)
        shutil.copy(sample / name, path)
        return path

    return copy


def test_visit_holds_all_that_is_shown(visits, drop):
    visit = visits.begin("a", [drop("videos/clip_0001.mp4")])
    assert visit.whole.present == ("video", "audio")
    assert visit.missing == {"detections": "no boxes were given"}
    assert visit.times == pytest.approx(1.5 * (np.arange(4) + 0.5) / 4)


def test_answers_are_those_of_each_ones_clip(visits, drop):
    visits.begin("a", [drop("videos/clip_0001.mp4")])
    visits.begin("b", [drop("videos/clip_0003.mp4")])
    said = [visits.answer(visitor, ["video"]) for visitor in "aba"]
    assert said[0] == said[2] != said[1]
    assert NOTHING in visits.answer("a", [])
    assert "of the student&#39;s modalities" in visits.answer("a", ["detections"])
    assert GONE in visits.answer("c", ["video"])


def test_files_go_as_their_visitor_does_or_gives_others(visits, drop):
    film, other, boxes = (
        drop(name) for name in ("videos/clip_0001.mp4", "videos/clip_0002.mp4", "boxes/clip_0001.json")
    )
    visits.begin("a", [film])
    visits.begin("a", [film, boxes])
    assert film.exists()
    assert boxes.exists()
    visits.begin("b", [film])
    visits.begin("a", [other])
    assert film.exists()  # it is b's too: equal uploads are one file
    assert not boxes.exists()
    visits.end("b")
    assert not film.exists()
    assert not film.parent.exists()
    visits.end("a")
    assert not other.exists()
    visits.end("nobody")
    assert GONE in visits.answer("a", ["video"])


def test_too_many_visitors_push_out_the_first(visits, drop, monkeypatch):
    monkeypatch.setattr(visits_module, "MOST_VISITS", 2)
    film = drop("videos/clip_0001.mp4")
    for visitor in "abc":
        visits.begin(visitor, [film])
    assert GONE in visits.answer("a", ["video"])
    assert GONE not in visits.answer("b", ["video"])


def test_damaged_part_of_a_clip_is_named_and_the_rest_is_used(visits, drop, tmp_path):
    bad = drop("boxes/clip_0001.json")
    bad.write_text("[{]")
    visit = visits.begin("a", [drop("videos/clip_0001.mp4"), bad])
    assert visit.readings["detections"].state == FAILED
    assert visit.missing["detections"].startswith("clip_0001.json: cannot be read as JSON")
    assert visit.whole.present == ("video", "audio")


def test_what_cannot_be_answered_is_refused_without_the_folder(visits, drop, tmp_path, make_student):
    bad = drop("videos/clip_0001.mp4")
    bad.write_bytes(b"no film")
    with pytest.raises(MediaError, match=r"^clip_0001\.mp4: video and audio failed: not a media file") as raised:
        visits.begin("a", [bad])
    assert str(tmp_path) not in str(raised.value)
    assert GONE in visits.answer("a", ["video"])
    with pytest.raises(MediaError, match="2 clips, expected one"):
        visits.begin("a", [bad, drop("videos/clip_0002.mp4")])
    heard = load(make_student(data={"modalities": ("video", "audio")}), "cpu")
    with pytest.raises(MediaError, match=r"clip_0001\.json: this student does not know detections\. Leave it out\."):
        Visits(heard, visits.pool).begin("a", [drop("videos/clip_0003.mp4"), drop("boxes/clip_0001.json")])
