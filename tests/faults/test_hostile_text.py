"""Tables, settings and options of any text: a table or settings that hold what they promise, or one short line."""

import csv
import io
import json
import math

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from karmma.data.annotations import SPLITS
from karmma.data.clips import MAX_CLASSES, read_clip_table
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError, KarmmaError, TableError
from karmma.data.settings import assigned, read_toml, resolve
from karmma.distill.config import StudentConfig
from karmma.extract.config import ExtractConfig
from karmma.fuse.config import SweepConfig, TeacherConfig
from pyarrow import parquet

LONGEST_LINE = 2000
SECTIONS = {
    "data": DataConfig, "extract": ExtractConfig, "teacher": TeacherConfig, "student": StudentConfig,
    "sweep": SweepConfig,
}  # fmt: skip
WORDS = (
    "", " ", "a", "train", "val", "test", "1", "-1", "007", "1.5", "nan", "NaN", "inf", "-inf", "1e400", "1e-400",
    "0x10", "１２", "9" * 30, str(MAX_CLASSES), "../../etc/passwd", "/etc/passwd", "..", "~", "$HOME", "a\nb", "a\r\nb",
    "\r", "\t", "\0", "a\0", "x" * 10_000, "é", "\u202e", "\U0001f600", '"', "'", ",", ";", "=1+1", "<script>",
    "{clip_id}", "{0.__class__}", "%s%n", "clip*", "**", "s3://bucket/x", "file.h5::name", "::", "None", "null", "true",
)  # fmt: skip
CELL = st.sampled_from(WORDS) | st.text(max_size=12)
COLUMNS = (
    "clip_id", "video", "start_s", "stop_s", "split", "verb", "noun", "participant", "video_id", "audio", "flow",
    "video_fps", "audio_hz", "a column of one's own",
)  # fmt: skip
TABLE = st.lists(st.sampled_from(COLUMNS), unique=True, min_size=1).flatmap(
    lambda names: st.tuples(
        st.just(names), st.lists(st.lists(CELL, min_size=len(names), max_size=len(names)), max_size=6)
    )
)
# Rows that are good but for one cell, so that the check of each column is come to.
GOOD = {
    "clip_id": "c", "video": "v.mp4", "start_s": "0", "stop_s": "2", "split": "train", "verb": "go", "video_fps": "30",
}  # fmt: skip
ONE_CELL = st.tuples(st.sampled_from(sorted(GOOD)), CELL).map(
    lambda changed: (list(GOOD), [list((GOOD | {changed[0]: changed[1]}).values())])
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | CELL,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CELL, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def require_one_short_line(error, *parts):
    text = str(error)
    assert len(text.splitlines()) == 1, text
    assert len(text) <= LONGEST_LINE
    assert all(part in text for part in parts), text


def require_sound(table):
    """Require of a table that was read what everything behind it relies on."""
    assert len({*table.clip_ids}) == table.n_clips
    assert all(table.clip_ids)
    assert {*table.split} <= {*SPLITS}
    for row in range(table.n_clips):
        clip = table.clip(row)
        assert math.isfinite(clip.start_s)
        assert clip.start_s >= 0
        assert clip.stop_s is None or clip.start_s < clip.stop_s < math.inf
        assert all(rate > 0 for rate in clip.rates.values())
        json.dumps(table.sources(row), allow_nan=False)
    names, labels = table.classes("verb"), table.labels("verb")
    assert len(names) <= MAX_CLASSES
    assert ((labels >= -1) & (labels < max(len(names), 1))).all()
    assert len(table.content_digest()) == 16


def read(path):
    try:
        table = read_clip_table(path, ("verb",))
    except TableError as error:
        require_one_short_line(error)
        return None
    require_sound(table)
    return table


@settings(max_examples=300, deadline=None)
@given(TABLE | ONE_CELL)
@example((list(GOOD), [list(GOOD.values())]))
def test_csv_of_any_cells_is_a_sound_table_or_one_line(folder, made):
    header, rows = made
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    (folder / "clips.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    table = read(folder / "clips.csv")
    if table is not None:  # a table that is written and read again is the same
        table.write(folder / "again.parquet")
        assert read_clip_table(folder / "again.parquet", ("verb",)).content_digest() == table.content_digest()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_no_table_or_a_sound_one(folder, data):
    for name in ("bytes.csv", "bytes.parquet", "bytes.json"):
        (folder / name).write_bytes(data)
        read(folder / name)


COLUMN = (
    st.lists(st.floats() | st.none(), min_size=1, max_size=1)
    | st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=1)
    | st.lists(st.binary(max_size=4), min_size=1, max_size=1)
    | st.lists(st.lists(st.integers(0, 9), max_size=2), min_size=1, max_size=1)
    | st.lists(CELL, min_size=1, max_size=1)
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GOOD)), COLUMN)
def test_parquet_column_of_any_type_is_a_sound_table_or_one_line(folder, name, column):
    parquet.write_table(pa.table({key: [value] for key, value in GOOD.items()} | {name: column}), folder / "t.parquet")
    read(folder / "t.parquet")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_value_of_any_setting_fits_or_is_one_line_that_names_its_section(data):
    section = data.draw(st.sampled_from(sorted(SECTIONS)))
    name = data.draw(st.sampled_from(sorted(SECTIONS[section].model_fields)) | CELL)
    value = data.draw(JSON)
    try:
        found = resolve(SECTIONS, ("karmma.toml", {section: {name: value}}))
    except ConfigError as error:
        require_one_short_line(error, section)
        return
    json.dumps(found[section].model_dump(mode="json"), allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode), CELL)
def test_any_settings_file_and_any_option_is_read_or_one_line(folder, data, text):
    (folder / "karmma.toml").write_bytes(data)
    for parse in (lambda: read_toml(folder / "karmma.toml"), lambda: assigned(text)):
        try:
            resolve(SECTIONS, ("karmma.toml", parse()))
        except KarmmaError as error:
            require_one_short_line(error)
