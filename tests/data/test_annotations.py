import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from karmma.data.clips import read_clip_table, read_clips
from karmma.data.config import DataConfig
from karmma.data.errors import TableError
from pyarrow import parquet

TABLE = """clip_id,video,start_s,stop_s,split,participant,verb,noun,audio,detections,remark
001,v/a.mp4,0,1.5,train,P01,put,7,sound/a.wav,,x
002,v/a.mp4,1.5,3,val,P02,take,10,,b.json,"a, b"
003,/elsewhere/b.mp4,,,,,,0,,,
"""


@pytest.fixture
def table(tmp_path):
    def write(text, name="clips.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_read_clip_table_gives_every_column_its_meaning(table):
    path = table(TABLE)
    clips = read_clip_table(path, ("verb", "noun"))
    assert clips.n_clips == 3
    assert clips.clip_ids.tolist() == ["001", "002", "003"]
    assert clips.split.tolist() == ["train", "val", "train"]
    assert clips.rows("train").tolist() == [0, 2]
    assert clips.rows("test").tolist() == []
    assert clips.rows("val").dtype == np.int64
    first, last = clips.clip(0), clips.clip(np.int64(2))
    assert (first.clip_id, first.start_s, first.stop_s) == ("001", 0.0, 1.5)
    assert first.video == path.parent / "v/a.mp4"
    assert first.sources == {"audio": path.parent / "sound/a.wav", "detections": None}
    assert str(last.video) == "/elsewhere/b.mp4"
    assert (last.start_s, last.stop_s) == (0.0, None)
    assert clips.sources(1) == ["002", "v/a.mp4", 1.5, 3.0, {"audio": None, "detections": "b.json"}]
    assert isinstance(clips.arrow, pa.Table)
    assert clips.arrow.column("participant").to_pylist() == ["P01", "P02", None]


def test_labels_of_words_are_sorted_and_of_integers_keep_their_value(table):
    clips = read_clip_table(table(TABLE), ("verb", "noun"))
    assert clips.classes("verb") == ("put", "take")
    assert clips.labels("verb").tolist() == [0, 1, -1]
    assert clips.classes("noun") == tuple(map(str, range(11)))
    assert clips.labels("noun").tolist() == [7, 10, 0]
    assert clips.labels("noun").dtype == np.int64


def test_classes_of_words_put_numbers_first_by_value(table):
    clips = read_clip_table(table("clip_id,video,d\na,v,10\nb,v,9\nc,v,two\nd,v,a\n"), ("d",))
    assert clips.classes("d") == ("9", "10", "a", "two")


def test_labels_with_a_run_s_classes_follow_them_and_name_what_they_lack(table):
    clips = read_clip_table(table(TABLE), ("verb", "noun"))
    assert clips.labels("verb", ("take", "cut", "put")).tolist() == [2, 0, -1]
    assert clips.labels("noun", tuple(map(str, range(300)))).tolist() == [7, 10, 0]
    with pytest.raises(TableError, match=r"clip '002' has the verb 'take', which the run does not know.*'tape'"):
        clips.labels("verb", ("put", "tape"))
    with pytest.raises(TableError, match=r"no head 'nuon' was read.*'noun'"):
        clips.labels("nuon")


def test_labels_of_an_unlabelled_column_are_all_missing(table):
    clips = read_clip_table(table("clip_id,video,verb\na,v,\nb,v,\n"), ("verb",))
    assert clips.classes("verb") == ()
    assert clips.labels("verb").tolist() == [-1, -1]


def test_parquet_gives_the_same_as_csv(table, tmp_path):
    columns = {
        "clip_id": ["001", "002", "003"],
        "video": ["v/a.mp4", "v/a.mp4", "/elsewhere/b.mp4"],
        "start_s": [0.0, 1.5, None],
        "stop_s": [1.5, 3.0, None],
        "split": ["train", "val", None],
        "participant": ["P01", "P02", None],
        "verb": pa.array(["put", "take", None]).dictionary_encode(),
        "noun": [7.0, 10.0, 0.0],  # as pandas writes integers with gaps
        "audio": ["sound/a.wav", None, None],
        "detections": [None, "b.json", None],
    }
    parquet.write_table(pa.table(columns), tmp_path / "clips.parquet")
    one, two = (read_clip_table(path, ("verb", "noun")) for path in (table(TABLE), tmp_path / "clips.parquet"))
    assert one.arrow.equals(two.arrow)
    assert [one.sources(row) for row in range(3)] == [two.sources(row) for row in range(3)]


def test_bad_rows_are_counted_and_the_first_five_shown_with_line_and_reason(table):
    path = table(
        "clip_id,video,start_s,stop_s,split,verb\n"
        "a,v,0,1,train,x\n"
        "a,v,0,1,train,x\n"  # line 3
        '\n"two\nlines",v,0,1,train,x\n'  # lines 5 and 6, fine
        ",v,0,1,train,x\n"  # line 7
        "c,,0,1,train,x\n"
        "d,v,soon,1,train,x\n"
        "e,v,nan,1,train,x\n"
        "f,v,-1,1,train,x\n"
        "g,v,2,2,train,x\n"
        "h,v,0,inf,train,x\n"
        "i,v,0,1,valid,x\n"
        "j,v,0,1\n"
    )
    with pytest.raises(TableError) as caught:
        read_clip_table(path, ("verb",))
    said = str(caught.value)
    assert said.startswith(f"{path}: 10 bad rows: line 3: clip_id 'a' is taken by line 2; line 7: clip_id is empty; ")
    assert "line 8: video is empty; line 9: start_s = 'soon', expected seconds, 0 or more; line 10: start_s" in said
    assert "; and 5 more. " in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("f,v,-1,1,train,3", "start_s = '-1'"),
        ("g,v,2,2,train,3", "stop_s = 2 is not after start_s = 2"),
        ("h,v,0,inf,train,3", "stop_s = 'inf'"),
        ("i,v,0,1,valid,3", "unknown split 'valid', expected train, val, test"),
        ("j,v,0,1", "4 cells, the header has 6"),
        ("k,v,0,1,train,-2", "verb = -2, expected a class index from 0"),
        ("k,v,0,1,train,123456789", "verb = 123456789, expected a class index"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(table, row, reason):
    with pytest.raises(TableError, match="1 bad row: line 3: ") as caught:
        read_clip_table(table(f"clip_id,video,start_s,stop_s,split,verb\na,v,0,1,train,3\n{row}\n"), ("verb",))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no column 'clip_id'"),
        ("clip_id,video,verb\n", "no rows below the header"),
        ("clip_id,verb\na,x\n", "no column 'video'"),
        ("clip_id,video,verbs\na,v,x\n", "no column 'verb'. Did you mean 'verbs'?"),
        ("clip_id,video,verb,verb\na,v,x,x\n", "column 'verb' occurs twice"),
        ('clip_id,video,verb\na,v,x\nb,"v"w,x\n', "line 3: not CSV"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(table, text, reason):
    with pytest.raises(TableError) as caught:
        read_clip_table(table(text), ("verb",))
    assert reason in str(caught.value)


def test_a_table_that_is_missing_or_of_another_kind_says_so(table, tmp_path):
    with pytest.raises(TableError, match=r"none\.csv: no such clip table"):
        read_clip_table(tmp_path / "none.csv", ("verb",))
    with pytest.raises(TableError, match=r"\.xlsx: a clip table ends in \.csv or \.parquet"):
        read_clip_table(table("x", "clips.xlsx"), ("verb",))
    with pytest.raises(TableError, match="cannot be read as Parquet"):
        read_clip_table(table("x", "clips.parquet"), ("verb",))
    (tmp_path / "latin.csv").write_bytes("clip_id,video,verb\na,v,\xe9\n".encode("latin-1"))
    with pytest.raises(TableError, match="not UTF-8 text"):
        read_clip_table(tmp_path / "latin.csv", ("verb",))


def test_a_table_with_a_byte_order_mark_and_spaces_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfclip_id, video ,verb\r\na , v,x\r\n")
    clips = read_clip_table(tmp_path / "a.csv", ("verb",))
    assert clips.sources(0) == ["a", "v", 0.0, None, {}]


def test_an_unknown_split_asked_for_raises(table):
    with pytest.raises(TableError, match=r"Unknown split 'tst'\. Did you mean 'test'\?"):
        read_clip_table(table(TABLE), ("verb",)).rows("tst")


def test_a_table_of_epic_s_size_loads_in_two_seconds(table):
    rows = (
        f"P01_{i:06d},videos/P01_{i % 700}.MP4,{i * 0.5:.2f},{i * 0.5 + 2:.2f},train,P01,{i % 97}"
        for i in range(67_217)
    )
    path = table("clip_id,video,start_s,stop_s,split,participant,verb\n" + "\n".join(rows))
    begin = time.process_time()
    clips = read_clip_table(path, ("verb",))
    assert time.process_time() - begin < 2
    assert len(clips.classes("verb")) == 97
    assert clips.arrow.nbytes < 10_000_000


def test_reading_a_table_imports_neither_av_nor_cv2_nor_torch(table):
    path = table(TABLE)
    ask = "import sys; from pathlib import Path; from karmma.data.clips import read_clip_table; "
    ask += f"read_clip_table(Path({str(path)!r}), ('verb',)); print(*({{'av', 'cv2', 'torch'}} & {{*sys.modules}}))"
    assert not subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def test_grid_table_reads_as_its_class_list_says(shared_data):
    clips = read_clip_table(shared_data / "grid/clips.csv", ("verb", "colour", "digit"))
    assert clips.n_clips == 1000
    assert [len(clips.rows(split)) for split in ("train", "val", "test")] == [700, 100, 200]
    assert clips.classes("colour") == ("blue", "green", "red", "white")
    assert clips.clip(0).video.is_file()


def test_video_id_and_patterns_say_where_files_are_and_columns_win(table):
    path = table("clip_id,video_id,participant,audio,verb\na,v1,p1,own.wav,x\nb,v2,p2,,x\n")
    data = DataConfig(
        table=path, heads=("verb",), media=path.parent / "media", video_files="{participant}/{video_id}.mp4",
        audio_files="never/{clip_id}.wav", detections_files="boxes/part*.json", video_fps=24,
    )  # fmt: skip
    one, two = (read_clips(data).clip(row) for row in (0, 1))
    assert one.video == path.parent / "media/p1/v1.mp4"
    assert one.sources == {
        "audio": path.parent / "media/own.wav", "detections": path.parent / "media/boxes/part*.json",
    }  # fmt: skip
    assert two.sources["audio"] is None
    assert (two.video_id, two.rates) == ("v2", {"video": 24})


def test_data_that_moves_keeps_its_digest_and_rates_are_part_of_it(table):
    path = table("clip_id,video,verb\na,v1.mp4,x\n")
    data = DataConfig(table=path, heads=("verb",))
    sources = [read_clips(data.model_copy(update=more)).sources(0) for more in ({}, {"media": "/x"}, {"video_fps": 5})]
    assert sources[0] == sources[1] != sources[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip_id,video_id,verb\na,v1,x\n", "Or name the column video_id, and set video_files"),
        ("clip_id,video,video_fps,verb\na,v,0,x\n", "video_fps = '0', expected a number above 0"),
        ("clip_id,video,audio_hz,verb\na,v,many,x\n", "audio_hz = 'many', expected a number above 0"),
        ("clip_id,video,start_s,verb\na,v,1e300,x\n", "start_s = '1e300', expected seconds, 0 or more"),
    ],
)
def test_sources_that_cannot_be_found_are_bad(table, text, message):
    with pytest.raises(TableError, match=message):
        read_clip_table(table(text), ("verb",))


def test_empty_video_id_is_a_bad_row(table):
    path = table("clip_id,video_id,verb\na,,x\nb,v,x\n")
    data = DataConfig(table=path, heads=("verb",), video_files="{video_id}.mp4")
    with pytest.raises(TableError, match="line 2: video_id is empty"):
        read_clips(data)


def test_several_files_are_one_table_and_say_their_split(table):
    data = DataConfig(
        table=table("clip_id,video,verb\na,v,x\n"), val_table=table("clip_id,video,verb\nb,v,x\n", "val.csv"),
        test_table=table("clip_id,video,participant\nc,v,p\n", "test.csv"), heads=("verb",),
    )  # fmt: skip
    clips = read_clips(data)
    assert clips.split.tolist() == ["train", "val", "test"]
    assert clips.labels("verb").tolist() == [0, 0, -1]
    assert clips.participants().tolist() == ["", "", "p"]
