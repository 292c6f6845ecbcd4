"""Reading tokens past zarr: every layout gives what zarr gives, and a batch that is held is never written over."""

import json
import threading

import numpy as np
import pytest
import torch
import zarr
from karmma.data.batches import TokenReader, plan_epoch
from karmma.data.errors import CacheError
from karmma.data.modality import PRESENT
from karmma.data.shards import OPEN_FILES, ShardFiles, memory_bytes
from karmma.data.stores import TokenStore
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

N, V, K, D = 11, 2, 3, 5
VALUES = np.random.default_rng(0).standard_normal((N, V, K, D)).astype(np.float16)
VALUES[4, 0] = np.nan  # absent


BYTES, CHECKED = [BytesCodec()], [BytesCodec(), Crc32cCodec()]


def sharding(inner=(1, 1, K, D), codecs=BYTES, index_codecs=CHECKED, **options):
    return ShardingCodec(chunk_shape=inner, codecs=codecs, index_codecs=index_codecs, **options)


# Name -> (what zarr is to make the array with, whether it is our own layout).
LAYOUTS = {
    "ours": ({"chunks": (4, 1, K, D), "serializer": sharding()}, True),
    "two clips a shard": ({"chunks": (2, 1, K, D), "serializer": sharding()}, True),
    "all in one shard": ({"chunks": (16, 1, K, D), "serializer": sharding()}, True),
    "compressed": ({"chunks": (4, 1, K, D), "serializer": sharding(codecs=[BytesCodec(), ZstdCodec()])}, False),
    "checked": ({"chunks": (4, 1, K, D), "serializer": sharding(codecs=CHECKED)}, False),
    "big-endian": ({"chunks": (4, 1, K, D), "serializer": sharding(codecs=[BytesCodec(endian="big")])}, False),
    "index first": ({"chunks": (4, 1, K, D), "serializer": sharding(index_location="start")}, False),
    "index unchecked": ({"chunks": (4, 1, K, D), "serializer": sharding(index_codecs=BYTES)}, False),
    "both views in a shard": ({"chunks": (4, 2, K, D), "serializer": sharding()}, False),
    "two clips a chunk": ({"chunks": (4, 1, K, D), "serializer": sharding((2, 1, K, D))}, False),
    "part of a clip a chunk": ({"chunks": (4, 1, K, D), "serializer": sharding((1, 1, 1, D))}, False),
    "no shards": ({"chunks": (2, 1, K, D)}, False),
    "other names": ({"chunks": (4, 1, K, D), "serializer": sharding(), "chunk_key_encoding": {"name": "v2"}}, False),
    "float32": ({"chunks": (4, 1, K, D), "serializer": sharding(), "dtype": "float32"}, False),
}


def written(path, how):
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    options = {"shape": VALUES.shape, "dtype": "float16", "fill_value": np.nan, "compressors": None, **how}
    group.create_array("tokens", **options)[:] = VALUES
    group.create_array("state", data=np.full((N, V), PRESENT, np.uint8), chunks=(4, 1))
    return TokenStore.open(path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [[0], [10, 0, 5], [3, 3, 4], list(range(N)), []], ids=str)
def test_every_layout_gives_what_zarr_gives(layout, rows, tmp_path):
    how, is_ours = LAYOUTS[layout]
    store = written(tmp_path / "x.zarr", how)
    assert ShardFiles.understands(json.loads((tmp_path / "x.zarr/tokens/zarr.json").read_text())) == is_ours
    for view in range(V):
        found = store.read(np.array(rows, int), view)
        assert found.dtype == np.float16
        assert np.array_equal(found, np.asarray(store.tokens[:, view])[rows], equal_nan=True)
        assert np.array_equal(found, VALUES[rows, view], equal_nan=True)


def test_rows_are_read_into_memory_that_is_given(tmp_path):
    store, out = written(tmp_path / "x.zarr", LAYOUTS["ours"][0]), np.zeros((2, K, D), np.float16)
    assert store.read(np.array([7, 2]), 1, out) is out
    assert np.array_equal(out, VALUES[[7, 2], 1])


def test_more_shards_than_open_files_are_read_by_many_threads(tmp_path):
    n = 2 * OPEN_FILES
    store = TokenStore.create(tmp_path / "x.zarr", (n, 1, 1, 2), 1, {})
    for row in range(n):
        store.write_shard(row, 0, np.full((1, 1, 2), row, np.float16), np.ones(1, np.uint8))
    store, wrong = TokenStore.open(tmp_path / "x.zarr"), []

    def read(seed):
        rows = np.random.default_rng(seed).permutation(n)
        wrong.extend(rows[store.read(rows, 0)[:, 0, 0] != rows])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store._files._open) == OPEN_FILES


@pytest.mark.parametrize("damage", ["cut short", "index", "empty"])
def test_damaged_shard_is_named_and_nothing_is_returned(damage, tmp_path):
    written(tmp_path / "x.zarr", LAYOUTS["ours"][0])
    file = tmp_path / "x.zarr/tokens/c/1/0/0/0"
    whole = file.read_bytes()
    bad = {"cut short": whole[:40], "index": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}[damage]
    file.write_bytes(bad)
    with pytest.raises(CacheError, match=r"tokens/c/1/0/0/0: .*Run karmma cache verify --drop, then karmma extract"):
        TokenStore.open(tmp_path / "x.zarr").read(np.array([5]), 0)


def test_batches_that_are_held_keep_their_values_and_memory_is_used_again(tmp_path):
    store = written(tmp_path / "x.zarr", LAYOUTS["ours"][0])
    reader, rows = TokenReader({"video": store}, np.arange(N)), np.arange(N)
    plan = [batch for epoch in range(4) for batch in plan_epoch(rows, 3, seed=0, epoch=epoch)]
    held = list(reader.batches(plan, 0))
    parts = [batch.tokens["video"][1:2] for batch in held]  # a part alone keeps the memory of its batch
    wanted = [VALUES[batch.rows, 0] for batch in held]
    for batch, expected in zip(held, wanted, strict=True):
        assert np.array_equal(batch.tokens["video"], expected, equal_nan=True)
    del held, batch
    list(reader.batches(plan, 1))
    for part, expected in zip(parts, wanted, strict=True):
        assert np.array_equal(part, expected[1:2], equal_nan=True)
    del part, parts
    places = {batch.tokens["video"].data_ptr() for batch in reader.batches(plan, 0)}
    assert len(places) <= 3  # one in use, one that is read, and the one let go of last


def test_batch_let_go_of_while_its_gradient_needs_it_is_not_written_over(tmp_path):
    store = written(tmp_path / "x.zarr", LAYOUTS["ours"][0])
    reader, graphs = TokenReader({"video": store}, np.arange(N)), []
    weight = torch.ones(D, dtype=torch.float16, requires_grad=True)
    for batch in reader.batches([np.array([at]) for at in (0, 1, 2, 3, 5, 6)], 0):
        graphs.append((batch.tokens["video"] * weight).sum())
    sum(graphs).backward()
    wanted = VALUES[[0, 1, 2, 3, 5, 6], 0].astype(np.float32).sum((0, 1))
    assert np.allclose(weight.grad, wanted, atol=0.05)


@pytest.mark.parametrize("is_mapped", [True, False])
def test_mapped_or_read_at_a_position_the_values_are_the_same(tmp_path, monkeypatch, is_mapped):
    monkeypatch.setattr("karmma.data.shards.memory_bytes", lambda: 2**40 if is_mapped else 0)
    store, rows = written(tmp_path / "x.zarr", LAYOUTS["ours"][0]), np.array([9, 4, 0, 10])
    assert np.array_equal(store.read(rows, 1), VALUES[rows, 1])
    assert {file._bytes is not None for file in store._files._open.values()} == {is_mapped}
    shard = tmp_path / "x.zarr/tokens/c/1/1/0/0"
    shard.write_bytes(shard.read_bytes()[-68:])  # the index alone, which points beyond the end
    with pytest.raises(CacheError, match=r"tokens/c/1/1/0/0: a clip has \d+ bytes, expected 30"):
        TokenStore.open(tmp_path / "x.zarr").read(np.array([7]), 1)


def test_memory_is_that_of_the_container_where_it_has_less(monkeypatch, tmp_path):
    whole = memory_bytes()
    assert 2**28 < whole < 2**50
    monkeypatch.setattr("karmma.data.shards.LIMIT", tmp_path / "memory.max")
    for text, expected in (("max\n", whole), ("1048576\n", 2**20), (f"{2**60}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert memory_bytes() == expected


def test_states_read_from_their_files_are_those_that_zarr_reads(tmp_path):
    store = TokenStore.create(tmp_path / "x.zarr", (N, V, K, D), 4, {})
    for shard, view in ((0, 0), (2, 0), (1, 1)):
        state = np.array([1, 2, 3, 1][: N - 4 * shard], np.uint8)
        store.write_shard(shard, view, VALUES[4 * shard : 4 * shard + 4, view], state)
    for view in range(V):
        assert store.state(np.arange(N), view).tolist() == np.asarray(store.states[:, view]).tolist()
    (tmp_path / "x.zarr/state/c/2/0").write_bytes(b"\1")
    with pytest.raises(CacheError, match="a state of 1 bytes, expected 4"):
        store.state(np.array([0]), 0)
