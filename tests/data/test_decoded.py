"""Decoded clips on disk: equal to decoding afresh, within their limit, and never trusted when damaged."""

import os
import threading

import numpy as np
import pytest
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.decoded import DecodedClips
from karmma.data.sample import write_sample

M = ("video", "audio")
PICTURE = np.arange(4 * 3 * 8 * 8, dtype=np.uint8).reshape(4, 3, 8, 8)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=4)
    return folder


@pytest.fixture
def data(tmp_path):
    return DataConfig(inputs=tmp_path / "inputs", modalities=M)


@pytest.fixture
def table(sample, data):
    return read_clip_table(sample / "clips.csv", data.heads)


def keep(table, data, *arrays, limit=10**6, view=0, **how):
    with DecodedClips(table, data, M, limit, **how) as decoded:
        for row, array in enumerate(arrays):
            decoded.keep(row, view, "video", array)
        decoded._threads.shutdown(wait=True)
    return DecodedClips(table, data, M, limit)


def files(data):
    return sorted(path for path in data.inputs.rglob("*") if path.is_file())


@pytest.mark.parametrize("array", [PICTURE, PICTURE.astype(np.float32) / 7], ids=["uint8", "float32"])
def test_what_was_kept_comes_back_bit_by_bit(table, data, array):
    again = keep(table, data, array)
    found = again.read(0, 0, "video").result()
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)
    assert again.read(1, 0, "video") is None
    assert again.read(0, 1, "video") is None
    assert again.read(0, 0, "audio") is None


def test_clip_with_other_times_and_other_settings_are_other_files(table, data, sample, tmp_path):
    keep(table, data, PICTURE)
    lines = (sample / "clips.csv").read_text().splitlines()
    columns = lines[0].split(",")
    cells = lines[1].split(",")
    cells[columns.index("stop_s")] = "0.75" if "stop_s" in columns else cells[0]
    text = "\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n"
    (tmp_path / "t.csv").write_text(text.replace("videos/", f"{sample}/videos/").replace("boxes/", f"{sample}/boxes/"))
    other = read_clip_table(tmp_path / "t.csv", data.heads)
    assert DecodedClips(other, data, M, 10**6).read(0, 0, "video") is None
    smaller = data.model_copy(update={"size": 32})
    assert DecodedClips(table, smaller, M, 10**6).read(0, 0, "video") is None
    assert DecodedClips(table, data.model_copy(update={"audio_hop": 81}), M, 10**6).read(0, 0, "video") is not None


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:200] + b"\xff" + b[201:]])
def test_damaged_file_is_named_removed_and_made_again(table, data, damage, caplog):
    keep(table, data, PICTURE)
    (path,) = files(data)
    path.write_bytes(damage(path.read_bytes()))
    again = DecodedClips(table, data, M, 10**6)
    assert again.read(0, 0, "video").result() is None
    assert f"{path}: damaged" in caplog.text
    assert again.read(0, 0, "video") is None
    assert np.array_equal(keep(table, data, PICTURE).read(0, 0, "video").result(), PICTURE)


def test_folder_stays_within_its_limit_and_says_so_once(table, data, caplog):
    size = PICTURE.nbytes + 132
    again = keep(table, data, PICTURE, PICTURE, PICTURE, PICTURE, limit=2 * size + 10)
    assert len(files(data)) == 2
    assert sum(path.stat().st_size for path in files(data)) <= 2 * size + 10
    assert caplog.text.count("Raise --decoded-gb") == 1
    assert again.read(2, 0, "video") is None
    keep(table, data, *[PICTURE] * 4, limit=3 * size + 10, view=1)  # what is there already counts
    assert len(files(data)) == 3


def test_several_processes_share_what_is_left(table, data):
    keep(table, data, *[PICTURE] * 4, limit=4 * (PICTURE.nbytes + 132), n_sharing=2)
    assert len(files(data)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_folder_that_cannot_be_written_is_said_once_and_stops_nothing(table, data, caplog):
    data.inputs.mkdir()
    data.inputs.chmod(0o500)
    keep(table, data, PICTURE, PICTURE)
    assert caplog.text.count("cannot be written") == 1


def test_file_in_the_way_of_the_folder_is_said_and_stops_nothing(table, data, caplog):
    data.inputs.write_text("not a folder")
    keep(table, data, PICTURE, PICTURE)
    assert "cannot be written" in caplog.text


def test_no_thread_is_left(table, data):
    before = threading.active_count()
    keep(table, data, PICTURE).__exit__()
    assert threading.active_count() == before
