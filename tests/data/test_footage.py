"""Files without a table: which films a name stands for, and the clips that are made of them."""

from pathlib import Path

import pytest
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError, MediaError
from karmma.data.footage import film_and_files, find_footage, footage_clip, length_s

DATA = DataConfig()


@pytest.fixture
def folder(tmp_path):
    """A folder of films, frames, and what is neither."""
    for name in (
        "b.MP4", "a.mkv", "notes.txt", "boxes.json", ".hidden.mp4", "deep/er/c.wav", "deep/frames/0001.jpg",
        "deep/frames/0002.jpg", "deep/mixed/0001.jpg", "deep/mixed/d.webm", "empty/readme.md", "rgb.h5",
    ):  # fmt: skip
        path = tmp_path / "films" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "films"


def test_folder_stands_for_all_films_below_it_in_order(folder):
    found = [str(path.relative_to(folder)) for path in find_footage(folder)]
    assert found == ["a.mkv", "b.MP4", "deep/er/c.wav", "deep/frames", "deep/mixed/d.webm"]


def test_file_frames_and_pack_stand_for_themselves(folder):
    for name in ("notes.txt", "deep/frames", "rgb.h5::P01/P01_06"):
        assert [str(path) for path in find_footage(f"{folder}/{name}")] == [f"{folder}/{name}"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing.mp4", "nothing.mp4: no such file or folder"),
        ("no.h5::P01", "no.h5: no such file or folder"),
        ("empty", "empty: holds no media file and no numbered pictures"),
    ],
)
def test_name_without_a_film_is_named(folder, name, said):
    with pytest.raises(MediaError, match=said):
        find_footage(folder / name)


def test_clip_has_only_the_sources_that_are_named(film, tmp_path):
    path = film("a.mp4", [0.0, 0.04, 0.08])
    clip = footage_clip(path, DATA)
    assert (clip.clip_id, clip.video, clip.start_s, clip.stop_s) == (str(path), path, 0.0, None)
    assert clip.sources == {"detections": None}  # sound is the film's own, flow is computed
    assert clip.video_id == "a"
    assert clip.rates == {}
    assert length_s(clip) == pytest.approx(0.12)
    released = DATA.model_copy(update={"flow_method": "released", "video_fps": 25.0, "audio_hz": 24_000.0})
    assert footage_clip(path, released).sources == {"detections": None, "flow": None}
    clip = footage_clip(path, released, (0.04, 0.1), {"audio": path, "flow": tmp_path}, {"video": 30})
    assert clip.sources == {"detections": None, "flow": tmp_path, "audio": path}
    assert clip.rates == {"video": 30, "audio": 24_000.0}
    assert (clip.start_s, clip.stop_s) == (0.04, 0.1)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"files": {"video": "b.mp4"}}, ConfigError, "video: no file of its own is read for that"),
        ({"files": {"audoi": "b.wav"}}, ConfigError, "Did you mean 'audio'?"),
        ({"files": {"audio": "b.wav"}}, MediaError, "b.wav: no such file"),
        ({"rates": {"detections": 12}}, ConfigError, "detections: has no rate"),
        ({"span": (2.0, 1.0)}, ConfigError, "from 2.0 to 1.0 s: expected a start from 0 on, and a later stop"),
        ({"span": (-1.0, None)}, ConfigError, "from -1.0 to None s"),
    ],
)
def test_clip_that_makes_no_sense_is_refused(film, given, error, said):
    with pytest.raises(error) as raised:
        footage_clip(film("a.mp4", [0.0, 0.04]), DATA, **given)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("names", "film", "files"),
    [
        ("a.mp4", "a.mp4", {}),
        ("a.wav", "a.wav", {}),
        ("a.json a.MKV", "a.MKV", {"detections": Path("a.json")}),
        ("b.wav a.json a.mp4", "a.mp4", {"audio": Path("b.wav"), "detections": Path("a.json")}),
        ("b.wav a.JSON", "b.wav", {"detections": Path("a.JSON")}),
        ("what", "what", {}),
    ],
)
def test_film_among_files_that_belong_together_is_found(names, film, files):
    assert film_and_files([Path(name) for name in names.split()]) == (Path(film), files)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("a.mp4 b.mp4", "2 clips, expected one: a.mp4, b.mp4. Leave only one of them."),
        ("a.wav b.wav", "2 clips, expected one"),
        ("a.mp4 a.wav b.wav", "2 sound files, expected one: a.wav, b.wav"),
        ("a.mp4 a.json b.json", "2 files of boxes, expected one: a.json, b.json"),
        ("a.json", "a.json: no clip is among the files. Add one."),
    ],
)
def test_files_that_do_not_belong_together_are_refused(names, said):
    with pytest.raises(MediaError) as raised:
        film_and_files([Path(name) for name in names.split()])
    assert said in str(raised.value)
