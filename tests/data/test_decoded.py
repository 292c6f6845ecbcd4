"""Decoded clips on disk: equal to decoding afresh, within their limit, and never trusted when damaged."""

import os
import shutil
import threading

import numpy as np
import pytest
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.decoded import DecodedClips
from karmma.data.errors import CacheError
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


@pytest.fixture
def own(sample, tmp_path):
    """A table of one's own whose files may be changed."""
    shutil.copytree(sample, tmp_path / "own")
    return tmp_path / "own"


def test_clip_with_other_times_and_other_settings_are_other_files(data, own):
    table = read_clip_table(own / "clips.csv", data.heads)
    keep(table, data, PICTURE)
    lines = (own / "clips.csv").read_text().splitlines()
    cells = lines[1].split(",")
    cells[lines[0].split(",").index("stop_s")] = "0.75"
    (own / "clips.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    other = read_clip_table(own / "clips.csv", data.heads)
    assert DecodedClips(other, data, M, 10**6).read(0, 0, "video") is None
    smaller = data.model_copy(update={"size": 32})
    assert DecodedClips(table, smaller, M, 10**6).read(0, 0, "video") is None
    assert DecodedClips(table, data.model_copy(update={"audio_hop": 81}), M, 10**6).read(0, 0, "video") is not None


def test_file_that_was_replaced_or_lies_elsewhere_is_another(table, data, own):
    mine = read_clip_table(own / "clips.csv", data.heads)
    keep(mine, data, PICTURE)
    assert DecodedClips(mine, data, M, 10**6).read(0, 0, "video") is not None
    assert DecodedClips(table, data, M, 10**6).read(0, 0, "video") is None  # the same names in another folder
    video = mine.clip(0).video
    video.write_bytes(video.read_bytes() + b"\0")
    assert DecodedClips(mine, data, M, 10**6).read(0, 0, "video") is None


def test_array_that_is_being_written_is_not_written_twice(table, data, caplog):
    for _ in range(5):
        keep(table, data, PICTURE)
        with DecodedClips(table, data, M, 10**6) as decoded:
            for _ in range(20):
                decoded.keep(1, 0, "video", PICTURE)
        files(data)[-1].unlink()
    assert caplog.text == ""


def test_full_disk_is_said_once_and_stops_nothing(table, data, monkeypatch, caplog):
    def full(*_, **__):
        raise CacheError(f"{data.inputs}: cannot be written: No space left on device.")

    monkeypatch.setattr("karmma.data.decoded.publish", full)
    keep(table, data, *[PICTURE] * 4)
    assert 1 <= caplog.text.count("No space left on device") <= 2  # two threads
    assert files(data) == []


def test_address_is_no_folder_for_decoded_clips():
    with pytest.raises(ValueError, match="a disk of this machine"):
        DataConfig(inputs="s3://bucket/inputs")


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
    keep(table, data, PICTURE).__exit__(None)
    assert threading.active_count() == before
