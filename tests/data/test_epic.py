"""EPIC-KITCHENS-100: the official files become one table, pruned and split as the paper says."""

import csv
from collections import Counter

import numpy as np
import pytest
from karmma.data.clips import read_clips, read_rows
from karmma.data.config import DataConfig
from karmma.data.errors import TableError

HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
).split(",")
NEVER_TRAINED = (205, 240, 288, 295)


def row(narration_id, video="P01_01", start="00:00:01.00", stop="00:00:02.50", verb=0, noun=0):
    cells = dict.fromkeys(HEADER, "")
    cells |= {"narration_id": narration_id, "participant_id": video[:3], "video_id": video, "all_nouns": "['a', 'b']"}
    cells |= {"start_timestamp": start, "stop_timestamp": stop, "verb_class": verb, "noun_class": noun}
    return cells


@pytest.fixture
def write(tmp_path):
    """Return a function that writes rows as an official file."""

    def write(name, rows, header=HEADER):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / name

    return write


@pytest.fixture
def full_training(write, shared_data):
    """As the full training table: every verb and all nouns but four, with the official class files beside it."""
    folder = shared_data / "epic"
    nouns = [noun for noun in range(300) if noun not in NEVER_TRAINED]
    path = write("EPIC_100_train.csv", [row(f"P01_01_{k}", verb=k % 97, noun=noun) for k, noun in enumerate(nouns)])
    for name in ("verb_classes", "noun_classes", "tail_verbs", "tail_nouns", "unseen_participant_ids_validation"):
        (path.parent / f"EPIC_100_{name}.csv").symlink_to(folder / f"EPIC_100_{name}.csv")
    return path


def test_pruned_validation_has_the_papers_9644_clips(full_training, shared_data):
    data = DataConfig(table=full_training, val_table=shared_data / "epic/EPIC_100_validation.csv")
    table = read_clips(data)
    val = table.rows("val")
    assert len(val) == 9644
    assert np.isin(table.participants()[val], sorted(table.unseen)).sum() == 1065
    assert table.unseen == {"P18", "P32"}
    assert "24 clips of 4 nouns" in table.notes[0]
    assert len(read_clips(data.model_copy(update={"prune": False})).rows("val")) == 9668


def test_classes_are_the_official_ones_in_their_order(full_training, shared_data):
    table = read_clips(DataConfig(table=full_training, val_table=shared_data / "epic/EPIC_100_validation.csv"))
    assert (len(table.classes("verb")), len(table.classes("noun"))) == (97, 300)
    assert table.classes("verb")[:3] == ("take", "put", "wash")
    with open(shared_data / "epic/EPIC_100_validation.csv", newline="", encoding="utf-8") as file:
        official = {cells["narration_id"]: cells for cells in csv.DictReader(file)}
    for head in ("verb", "noun"):
        labels = table.labels(head)
        for at in table.rows("val")[::97]:
            assert labels[at] == int(official[table.clip_ids[at]][f"{head}_class"])
    assert len(table.tail["verb"]) == 86
    assert table.tail["noun"] <= set(table.classes("noun"))


def test_every_official_row_has_its_seconds_and_its_files(shared_data):
    path = shared_data / "epic/EPIC_100_uda_source_train.csv"
    table = read_clips(DataConfig(table=path, flow_files="{participant}/flow/{video_id}", flow_method="released"))
    assert table.n_clips == 16115
    clip = table.clip(1)  # P01_01_1: 00:00:04.37 to 00:00:06.17, frames 262 to 370
    assert (clip.clip_id, clip.start_s, clip.stop_s) == ("P01_01_1", 4.37, 6.17)
    assert clip.video == path.parent / "P01/videos/P01_01.MP4"
    assert clip.sources == {"flow": path.parent / "P01/flow/P01_01"}
    assert clip.rates == {"video": 60, "flow": 30}
    with open(path, newline="", encoding="utf-8") as file:
        for at, cells in enumerate(csv.DictReader(file)):
            hours, minutes, seconds = cells["start_timestamp"].split(":")
            start_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
            assert table.arrow["start_s"][at].as_py() == pytest.approx(start_s, abs=1e-9)
            # The frame on display is within one of the official number, which was rounded in its own way.
            assert abs(int(start_s * 60 + 1e-6) + 1 - int(cells["start_frame"])) <= 2


def test_videos_of_2020_have_their_own_rates(write):
    table = read_clips(DataConfig(table=write("t.csv", [row("a"), row("b", video="P01_103")])))
    assert [table.clip(at).rates for at in (0, 1)] == [{"video": 60, "flow": 30}, {"video": 50, "flow": 50}]
    assert [table.clip(at).video_id for at in (0, 1)] == ["P01_01", "P01_103"]


def test_without_class_files_labels_are_indices(write):
    table = read_clips(DataConfig(table=write("t.csv", [row("a", verb=3), row("b", verb=1)])))
    assert table.classes("verb") == ("0", "1", "2", "3")
    assert table.labels("verb").tolist() == [3, 1]


def test_test_file_without_labels_is_unlabelled(write):
    header = [name for name in HEADER if not name.startswith(("verb", "noun", "all_"))]
    test = write("test.csv", [row("b", video="P02_01")], header)
    table = read_clips(DataConfig(table=write("t.csv", [row("a")]), test_table=test))
    assert table.split.tolist() == ["train", "test"]
    assert table.labels("noun").tolist() == [0, -1]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"start": "00:00:03.00"}, "stop_s = 2.5 is not after start_s = 3"),
        ({"start": "1 minute"}, "start_s = '1 minute', expected seconds"),
        ({"verb": 97}, "verb_class = 97, expected 0 to 96"),
        ({"narration_id": "a"}, "clip_id 'a' is taken by line 2"),
    ],
)
def test_bad_row_is_named(full_training, write, cells, reason):
    path = write("t.csv", [row("a"), row(**{"narration_id": "b", **cells})])
    with pytest.raises(TableError, match=r"t\.csv: 1 bad row: line 3: ") as raised:
        read_clips(DataConfig(table=path))
    assert reason in str(raised.value)
    table, bad = read_rows(DataConfig(table=path))
    assert (table.n_clips, len(bad), bad[0].line) == (1, 1, 3)


def test_repeated_id_in_another_file_names_it(write):
    data = DataConfig(table=write("t.csv", [row("a")]), val_table=write("v.csv", [row("a")]))
    with pytest.raises(TableError, match=r"v\.csv: 1 bad row: line 2: clip_id 'a' is taken by line 2 of t\.csv"):
        read_clips(data)


def test_other_heads_are_refused(write):
    with pytest.raises(TableError, match="has the heads verb and noun, asked for action"):
        read_clips(DataConfig(table=write("t.csv", [row("a")])), ("action",))


@pytest.fixture
def epic_star(shared_data):
    """The settings of Epic-Kitchens* on real rows."""
    folder = shared_data / "epic"
    return DataConfig(
        table=folder / "EPIC_100_uda_source_train.csv", val_table=folder / "EPIC_100_validation.csv", holdout="clips"
    )


def test_held_out_clips_are_a_tenth_in_proportion_over_the_actions(epic_star):
    table = read_clips(epic_star)
    whole = read_clips(epic_star.model_copy(update={"holdout": "none"}))
    train, val = table.rows("train"), table.rows("val")
    assert len(val) == round(0.1 * 16115)
    assert len(train) + len(val) == 16115
    assert len(table.rows("test")) == len(whole.rows("val"))
    verb, noun = table.labels("verb"), table.labels("noun")
    for labels in (verb, noun):
        assert {*labels[val]} <= {*labels[train]}
        assert {*labels[train]} == {*whole.labels("verb" if labels is verb else "noun")[whole.rows("train")]}
    everywhere, held = (Counter(zip(verb[r].tolist(), noun[r].tolist(), strict=True)) for r in ([*train, *val], val))
    for action, n_clips in everywhere.items():
        assert abs(held[action] - n_clips / 10) <= 1.5, action


def test_holdout_depends_on_its_seed_and_not_on_the_order_of_rows(write):
    rows = [row(f"c{k}", verb=k % 5, noun=k % 7) for k in range(200)]
    held = []
    for name, order, seed in (("a.csv", rows, 0), ("b.csv", rows[::-1], 0), ("c.csv", rows, 1)):
        table = read_clips(DataConfig(table=write(name, order), holdout="clips", holdout_seed=seed))
        held.append({*table.clip_ids[table.rows("val")].tolist()})
    assert held[0] == held[1] != held[2]
    assert len(held[0]) == len(held[2]) == 20


def test_holdout_never_takes_the_last_clip_of_a_label(write):
    rows = [row(f"c{k}", verb=k, noun=0) for k in range(40)] + [row(f"d{k}", verb=50, noun=1) for k in range(10)]
    table = read_clips(DataConfig(table=write("t.csv", rows), holdout="clips"))
    assert {*table.clip_ids[table.rows("val")].tolist()} < {f"d{k}" for k in range(10)}
    assert len(table.rows("val")) == 5


def test_holdout_by_video_keeps_videos_whole(epic_star):
    table = read_clips(epic_star.model_copy(update={"holdout": "videos"}))
    videos = np.array(table.arrow["video_id"].to_pylist())
    train, val = ({*videos[table.rows(split)]} for split in ("train", "val"))
    assert val
    assert not train & val
    n_train = len(table.rows("train"))
    assert 0.09 < 1 - n_train / 16115 < 0.2


def test_holdout_beside_a_split_of_ones_own_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("clip_id,video,split,verb\na,v,train,x\nb,v,val,x\n")
    with pytest.raises(TableError, match="has a split val already"):
        read_clips(DataConfig(table=tmp_path / "t.csv", heads=("verb",), holdout="clips"))
