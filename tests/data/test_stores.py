"""Token and logit stores: genuine Zarr, whole shards, explicit states."""

import json

import dask.array
import numpy as np
import pytest
import zarr
from karmma.data.errors import CacheError, IncompleteCacheError, KarmmaError
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.shards import ShardFiles
from karmma.data.stores import LogitStore, TokenStore


def numbers(n, k=5, width=8, start=0):
    return (np.arange(n * k * width, dtype=np.float16).reshape(n, k, width) / 7 + start).astype(np.float16)


@pytest.fixture
def store(tmp_path):
    """10 clips in shards of 4, one view; clip 1 absent, clip 9 failed, shard 1 never written."""
    made = TokenStore.create(tmp_path / "x.zarr", (10, 1, 5, 8), 4, {"identity": {"theta": 5}})
    first, last = numbers(4), numbers(2, start=50)
    first[1], last[1] = np.nan, np.nan
    made.write_shard(0, 0, first, np.array([PRESENT, ABSENT, PRESENT, PRESENT]))
    made.write_shard(2, 0, last, np.array([PRESENT, FAILED]))
    return TokenStore.open(tmp_path / "x.zarr")


def test_tokens_come_back_in_the_order_asked_for(store):
    found = store.read(np.array([3, 0, 8]), 0)
    assert np.array_equal(found, np.stack([numbers(4)[3], numbers(4)[0], numbers(1, start=50)[0]]))


def test_direct_reading_equals_zarr(store):
    for row in (0, 2, 3, 8):
        assert np.array_equal(store.read(np.array([row]), 0)[0], store.tokens[row, 0])


def test_other_codecs_are_left_to_zarr_with_the_same_result(tmp_path, store):
    group = zarr.open_group(str(tmp_path / "y.zarr"), mode="w", zarr_format=3)
    group.create_array("tokens", data=np.asarray(store.tokens[:]), chunks=(2, 1, 5, 8))
    group.create_array("state", data=np.asarray(store.states[:]), chunks=(2, 1))
    other = TokenStore.open(tmp_path / "y.zarr")
    assert not ShardFiles.understands(json.loads((tmp_path / "y.zarr/tokens/zarr.json").read_text()))
    rows = np.array([8, 2, 1])
    assert np.array_equal(other.read(rows, 0), store.read(rows, 0), equal_nan=True)


def test_absent_and_failed_rows_hold_nan_and_their_state(store):
    assert np.isnan(store.read(np.array([1, 9]), 0)).all()
    assert store.state(np.arange(10), 0).tolist() == [1, 2, 1, 1, 0, 0, 0, 0, 1, 3]


def test_row_never_written_is_refused_with_the_number(store):
    with pytest.raises(IncompleteCacheError, match="2 of 3 clips were never extracted in view 0"):
        store.read(np.array([0, 4, 5]), 0)
    with pytest.raises(IncompleteCacheError, match="has 10 clips, asked for row 12"):
        store.read(np.array([12]), 0)
    with pytest.raises(IncompleteCacheError, match=r"has 1 view\(s\), asked for view 1. Extract with --views 2"):
        store.read(np.array([0]), 1)


def test_zarr_and_dask_open_the_store_as_it_is(store):
    group = zarr.open_group(str(store.path), mode="r", use_consolidated=False)
    assert group.attrs["identity"] == {"theta": 5}
    assert group["tokens"].metadata.dimension_names == ("clip", "view", "token", "width")
    lazy = dask.array.from_zarr(str(store.path / "tokens"))
    assert np.array_equal(lazy[3, 0].compute(), numbers(4)[3])


def test_shard_bytes_are_those_that_zarr_writes(tmp_path, store):
    group = zarr.open_group(str(tmp_path / "z.zarr"), mode="w", zarr_format=3)
    layout = {"shards": (4, 1, 5, 8), "chunks": (1, 1, 5, 8), "fill_value": np.nan, "compressors": None}
    array = group.create_array("tokens", shape=(10, 1, 5, 8), dtype="float16", **layout)
    first = numbers(4)
    first[1] = np.nan
    array[:4] = first[:, None]
    ours, theirs = (folder / "tokens/c/0/0/0/0" for folder in (store.path, tmp_path / "z.zarr"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_shard_without_any_present_clip_is_readable(store):
    store.write_shard(1, 0, np.full((4, 5, 8), np.nan, np.float16), np.full(4, ABSENT))
    again = TokenStore.open(store.path)
    assert np.isnan(again.read(np.arange(4, 8), 0)).all()
    assert np.isnan(again.tokens[5, 0]).all()


def test_growing_keeps_every_row(store):
    before = store.read(np.array([0, 8]), 0)
    grown = store.grown(20, 2)
    assert grown.tokens.shape == (20, 2, 5, 8)
    assert np.array_equal(grown.read(np.array([0, 8]), 0), before)
    assert grown.state(np.arange(20), 1).tolist() == [0] * 20


def test_truncated_shard_is_named(store):
    file = store.path / "tokens/c/0/0/0/0"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CacheError, match=r"tokens/c/0/0/0/0: its index fails the checksum"):
        TokenStore.open(store.path).read(np.array([0]), 0)


def test_flipped_bit_in_the_index_is_found(store):
    file = store.path / "tokens/c/0/0/0/0"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(CacheError, match="fails the checksum"):
        TokenStore.open(store.path).read(np.array([0]), 0)


def test_missing_shard_file_is_named(store):
    (store.path / "tokens/c/2/0/0/0").unlink()
    with pytest.raises(CacheError, match=r"c/2/0/0/0: this shard is missing"):
        TokenStore.open(store.path).read(np.array([8]), 0)


def test_store_that_is_not_there_says_so(tmp_path):
    with pytest.raises(CacheError, match="no such store"):
        TokenStore.open(tmp_path / "none.zarr")


def test_many_shards_do_not_keep_many_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr("karmma.data.shards.OPEN_FILES", 3)
    made = TokenStore.create(tmp_path / "x.zarr", (8, 1, 5, 8), 1, {})
    for shard in range(8):
        made.write_shard(shard, 0, numbers(1, start=shard), np.array([PRESENT]))
    store = TokenStore.open(tmp_path / "x.zarr")
    order = np.array([7, 0, 3, 3, 6, 1, 2, 5, 4, 0])
    assert np.array_equal(store.read(order, 0)[:, 0, 0], order.astype(np.float16))
    assert len(store._files._open) == 3


@pytest.fixture
def logits(tmp_path):
    values = {"verb": np.arange(12, dtype=np.float32).reshape(3, 2, 2), "noun": np.ones((3, 2, 5), np.float32)}
    state = np.array([[1, 1], [2, 2], [1, 0]])
    values["verb"][1], values["verb"][2, 1] = np.nan, np.nan
    values["noun"][1], values["noun"][2, 1] = np.nan, np.nan
    classes = {"verb": list("ab"), "noun": list("vwxyz")}
    return LogitStore.write(tmp_path / "t.zarr", values, state, np.array(["ab", "cd", ""]), {"classes": classes})


def test_logits_are_read_by_clip_and_view(logits):
    found = LogitStore.open(logits.path).read(np.array([2, 0]), 0)
    assert found["verb"].tolist() == [[8, 9], [0, 1]]
    assert found["noun"].shape == (2, 5)


@pytest.mark.parametrize(("rows", "view"), [([1], 0), ([2], 1), ([0], 2), ([7], 0)])
def test_logits_of_a_clip_or_view_that_is_not_there_raise(logits, rows, view):
    with pytest.raises(IncompleteCacheError):
        logits.read(np.array(rows), view)
    assert not logits.has(np.array(rows), view).any()


def test_logits_that_are_not_finite_are_refused(tmp_path):
    infinite = {"verb": np.full((1, 1, 2), np.inf)}
    with pytest.raises(KarmmaError, match="head 'verb' are not finite"):
        LogitStore.write(tmp_path / "t.zarr", infinite, np.ones((1, 1)), np.array([""]), {"classes": {}})
    assert not (tmp_path / "t.zarr").exists()
