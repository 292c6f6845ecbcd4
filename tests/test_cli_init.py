"""`karmma init`: the settings file that it writes is read as it says, and the clips of a folder are found."""

import shutil
import tomllib
from pathlib import Path

import pytest
from karmma.cli_options import SECTIONS
from karmma.data.annotations import SPLITS
from karmma.data.clips import read_clips
from karmma.data.sample import write_sample
from karmma.data.settings import read_preset, read_toml, resolve, rooted


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    write_sample(folder, n_clips=8)
    return sorted((folder / "videos").glob("*.mp4"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(folder, films):
    folder.mkdir(parents=True)
    for film in films:
        shutil.copy(film, folder)


def settings(path):
    """Return what a settings file says; its folders are those of the working folder, which is its own."""
    written = rooted(read_toml(path), path.parent)
    found = resolve(SECTIONS, ("preset", read_preset(written.pop("preset"))), (str(path), written))
    folders = {name: Path(getattr(found["data"], name)).absolute() for name in ("cache", "inputs", "runs")}
    return found | {"data": found["data"].model_copy(update=folders)}


def test_folders_of_classes_become_a_table_with_a_validation_split(here, give, films):
    put(here / "mine" / "lift", films[:4])
    put(here / "mine" / "push", films[4:])
    code, _, err = give("init", "mine")
    assert code == 0, err
    assert err.strip().splitlines()[-1].startswith("Wrote karmma.toml and mine/clips.csv of 8 clips. Next: ")
    data = settings(here / "karmma.toml")["data"]
    table = read_clips(data)
    assert table.classes("label") == ("lift", "push")
    assert [len(table.rows(split)) for split in SPLITS] == [4, 2, 2]
    assert data.modalities == ("video", "flow", "audio")
    assert give("check")[0] == 0


def test_folders_of_splits_keep_their_splits_and_the_label_is_below(here, give, films):
    put(here / "mine" / "training" / "lift", films[:2])
    put(here / "mine" / "training" / "push", films[2:4])
    put(here / "mine" / "val" / "push" / "hard", films[4:5])
    assert give("init", "mine")[0] == 0
    table = read_clips(settings(here / "karmma.toml")["data"])
    assert [len(table.rows(split)) for split in SPLITS] == [4, 1, 0]
    assert table.classes("label") == ("lift", "push", "push/hard")


def test_table_that_is_there_is_taken_with_its_columns(here, give, films):
    put(here / "mine", films[:2])
    text = f"clip_id,video,split,verb,noun,detections\na,{films[0].name},train,x,y,\nb,{films[1].name},val,x,z,\n"
    (here / "mine" / "clips.csv").write_text(text)
    assert give("init", "mine", "--output", "mine/settings.toml", "--preset", "paper")[0] == 0
    found = settings(here / "mine" / "settings.toml")
    assert found["data"].heads == ("verb", "noun")
    assert found["data"].modalities == ("video", "flow", "audio", "detections")
    assert found["data"].frames == 32
    assert (here / "mine" / "clips.csv").read_text() == text


@pytest.mark.parametrize("what", ["epic", "ssv2"])
def test_known_data_sets_start_from_their_official_files(here, give, what):
    assert give("init", what, "--annotations", "lists", "--media", "/data/videos", "--output", "sub/k.toml")[0] == 0
    data = settings(here / "sub" / "k.toml")["data"]
    assert data.table.resolve() == here / "lists" / {"epic": "EPIC_100_train.csv", "ssv2": "train.json"}[what]
    assert data.heads == {"epic": ("verb", "noun"), "ssv2": ("action",)}[what]


@pytest.mark.parametrize("what", ["epic", "ssv2"])
@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_lines_behind_a_hash_are_what_holds_without_them(here, give, what, preset):
    assert give("init", what, "--preset", preset)[0] == 0
    text = (here / "karmma.toml").read_text()
    lines = [line.removeprefix("# ") if " = " in line and " = ..." not in line else line for line in text.splitlines()]
    (here / "all.toml").write_text("\n".join(lines))
    assert settings(here / "all.toml") == settings(here / "karmma.toml")
    said = tomllib.loads("\n".join(lines))
    for section, model in SECTIONS.items():
        part = text.partition(f"\n[{section}]\n")[2].partition("\n[")[0]
        assert {*said[section]} == {name for name in model.model_fields if f"# {name} = ..." not in part}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("none",), "none: no such folder. Name epic, ssv2, or a folder of clips."),
        (("empty",), "empty: holds no media file"),
        (("bare",), "bare/clips.csv: no label column among clip_id, video. Add one, such as action."),
        (("epic", "--output", "old.toml"), "old.toml: is there already and stays as it is."),
        (("epic", "--preset", "tinny"), "Unknown preset 'tinny'. Did you mean 'tiny'?"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(here, give, words, says):
    (here / "empty").mkdir()
    (here / "bare").mkdir()
    (here / "bare" / "clips.csv").write_text("clip_id,video\na,a.mp4\n")
    (here / "old.toml").write_text("mine")
    before = sorted(here.rglob("*"))
    code, _, err = give("init", *words)
    assert code == 1
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("places", "splits", "labels"),
    [
        (("clips/train/open", "clips/train/shut", "clips/val/open", "clips/test/shut"), [2, 1, 1], ("open", "shut")),
        (("open/train", "open/val", "shut/train", "shut/valid"), [2, 2, 0], ("open", "shut")),
        (("train", "car", "train", "car"), [2, 2, 0], ("car", "train")),  # vehicles
        (("a/b/lift", "a/b/push", "a/b/push/hard", "a/b/lift"), [3, 1, 0], ("lift", "push", "push/hard")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_labels_and_splits_are_told_from_the_folders_around(here, give, films, places, splits, labels):
    for film, place in zip(films, places, strict=False):
        (here / "mine" / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(film, here / "mine" / place)
    code, _, err = give("init", "mine")
    assert code == 0, err
    assert f"{splits[0]} train, {splits[1]} val, {splits[2]} test; {len(labels)} labels: {labels[0]}" in err
    table = read_clips(settings(here / "karmma.toml")["data"])
    assert [len(table.rows(split)) for split in SPLITS] == splits
    text = (here / "mine" / "clips.csv").read_text()
    assert {line.rpartition(",")[2] for line in text.splitlines()[1:]} == {*labels}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("a.wav", "b/c.mp3"), "mine: holds sound alone. Or write clips.csv there"),
        (("a.mp4", "b.mp4"), "mine: its films lie in no folders that could be their labels. Or write clips.csv"),
        ((" open/a.mp4", "shut/b.mp4"), "mine: a table cannot hold the name ' open/a.mp4'. Rename it."),
        (("open/a\rb.mp4",), r"mine: a table cannot hold the name 'open/a\rb.mp4'. Rename it."),
        (("open/\udcff.mp4",), r"mine: a table cannot hold the name 'open/\udcff.mp4'. Rename it."),
    ],
    ids=lambda value: ascii(value[0]) if isinstance(value, tuple) else "",
)
def test_folder_that_no_table_can_be_made_of_is_one_line(here, give, files, says):
    for name in files:
        (here / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "mine" / name).write_bytes(b"")
    code, _, err = give("init", "mine")
    assert code == 1
    assert says in err
    assert not (here / "karmma.toml").exists()
    assert not (here / "mine" / "clips.csv").exists()


def test_table_whose_columns_are_no_labels_takes_only_those_that_are(here, give, films):
    put(here / "mine", films[:3])
    text = "clip_id,video,note,speed,verb\n" + "".join(
        f"{i},{f.name},note {i},0.{i},x\n" for i, f in enumerate(films[:3])
    )
    (here / "mine" / "clips.csv").write_text(text)
    assert give("init", "mine")[0] == 0
    assert settings(here / "karmma.toml")["data"].heads == ("verb",)
    (here / "mine" / "clips.csv").write_text("clip_id;video;verb\na;a.mp4;x\n")
    code, _, err = give("init", "mine", "--output", "other.toml")
    assert code == 1
    assert "no column 'clip_id'. Known: clip_id;video;verb. A comma stands between columns." in err


def test_addresses_and_absolute_paths_stay_as_they_are(here, give):
    assert give("init", "epic", "--media", "s3://bucket/epic", "--annotations", "/lists")[0] == 0
    text = (here / "karmma.toml").read_text()
    assert 'media = "s3://bucket/epic"' in text
    assert 'table = "/lists/EPIC_100_train.csv"' in text
