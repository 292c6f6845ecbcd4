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
        (("bare",), "bare/clips.csv: no label column beside clip_id, video. Add one, such as action."),
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
