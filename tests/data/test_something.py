"""Something-Something V2: the official label files become one table."""

import json

import pytest
from karmma.data.clips import read_clips, read_rows
from karmma.data.config import DataConfig
from karmma.data.errors import TableError

LABELS = {"Poking something so that it falls over": "1", "Holding something": "0", "Closing something": "2"}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a JSON file, beside labels.json."""

    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    write("labels.json", LABELS)
    return write


def entry(clip_id, template="Holding [something]"):
    return {"id": clip_id, "label": "holding a cup", "template": template, "placeholders": ["a cup"]}


def read(path, **settings):
    return read_clips(DataConfig(table=path, heads=("action",), **settings))


def test_real_files_have_the_official_classes_in_their_order(shared_data):
    folder = shared_data / "ssv2"
    table = read(folder / "train.json", val_table=folder / "validation.json", test_table=folder / "unlabelled.json")
    assert [len(table.rows(split)) for split in ("train", "val", "test")] == [3, 106, 17]
    official = json.loads((folder / "labels.json").read_text())
    assert [official[name] for name in table.classes("action")] == [str(index) for index in range(174)]
    assert table.classes("action")[table.labels("action")[0]] == "Poking something so that it falls over"
    assert (table.labels("action")[table.rows("test")] == -1).all()
    assert (table.labels("action")[table.rows("val")] >= 0).all()


def test_clips_lie_where_the_official_archive_puts_them(write):
    clip = read(write("train.json", [entry("78687")])).clip(0)
    assert clip.video.parts[-2:] == ("20bn-something-something-v2", "78687.webm")
    assert (clip.start_s, clip.stop_s, clip.rates, clip.video_id) == (0.0, None, {"video": 12}, "78687")


def test_other_labels_file_gives_other_indices(write, shared_data):
    path = write("train.json", [entry("1", "Closing [something]")])
    assert read(path).labels("action").tolist() == [2]
    table = read(path, labels=shared_data / "boxes/labels_something_else.json")
    official = json.loads((shared_data / "boxes/labels_something_else.json").read_text())
    assert table.labels("action")[0] == int(official["Closing something"])


def test_entry_repeated_word_for_word_counts_once_and_another_is_bad(write):
    assert read(write("train.json", [entry("1"), entry("2"), entry("1")])).clip_ids.tolist() == ["1", "2"]
    path = write("train.json", [entry("1"), entry("1", "Closing [something]")])
    with pytest.raises(TableError, match=r"entry 2: clip_id '1' is taken by entry 1"):
        read(path)


def test_bad_entries_are_listed(write):
    path = write("train.json", [entry("1"), {"label": "x"}, entry("3", "Hodling [something]"), "4"])
    table, bad = read_rows(DataConfig(table=path, heads=("action",)))
    assert table.clip_ids.tolist() == ["1"]
    assert [row.line for row in bad] == [2, 3, 4]
    assert "expected an object with an id" in bad[0].reason
    assert "unknown template 'Hodling [something]'. Did you mean 'Holding something'?" in bad[1].reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", {"1": "x"}, "expected a list of clips, found dict"),
        ("labels.json", ["x"], "expected an object of template -> index"),
        ("labels.json", {"a": "0", "b": "5"}, "expected each index from 0 to 1 once"),
    ],
)
def test_file_of_another_form_is_refused(write, name, content, message):
    path = write("train.json", [entry("1")])
    write(name, content)
    with pytest.raises(TableError, match=message):
        read(path)


def test_missing_and_broken_files_are_named(write, tmp_path):
    with pytest.raises(TableError, match=r"none\.json: no such file"):
        read(tmp_path / "none.json")
    (tmp_path / "train.json").write_text("[{")
    with pytest.raises(TableError, match=r"train\.json: cannot be read as JSON"):
        read(tmp_path / "train.json")
    (tmp_path / "labels.json").unlink()
    with pytest.raises(TableError, match=r"no labels\.json beside it"):
        read(tmp_path / "train.json")


def test_other_heads_are_refused(write):
    with pytest.raises(TableError, match=r'Set heads = \["action"\]'):
        read_clips(DataConfig(table=write("train.json", [entry("1")]), heads=("verb",)))
