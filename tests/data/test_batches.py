"""Batch plans and the reader that stays one batch ahead."""

import numpy as np
import pytest
from karmma.data.batches import TokenReader, plan_epoch
from karmma.data.errors import CacheError
from karmma.data.modality import ABSENT, PRESENT
from karmma.data.stores import TokenStore


@pytest.fixture
def reader(tmp_path):
    """6 cache rows, read by a table of 5 clips in another order; video of cache row 2 is absent."""
    stores = {}
    for offset, modality in enumerate(("video", "audio")):
        store = TokenStore.create(tmp_path / f"{modality}.zarr", (6, 1, 2, 3), 4, {})
        values = np.arange(6, dtype=np.float16)[:, None, None] + np.full((6, 2, 3), 10 * offset, np.float16)
        state = np.full(6, PRESENT)
        if modality == "video":
            state[2], values[2] = ABSENT, np.nan
        store.write_shard(0, 0, values[:4], state[:4])
        store.write_shard(1, 0, values[4:], state[4:])
        stores[modality] = TokenStore.open(store.path)
    return TokenReader(stores, np.array([5, 4, 2, 1, 0]))


def test_plan_holds_every_row_once_and_depends_on_seed_and_epoch_alone():
    rows = np.arange(10, 33)
    plan = plan_epoch(rows, 5, seed=3, epoch=1)
    assert [len(batch) for batch in plan] == [5, 5, 5, 5, 3]
    assert sorted(np.concatenate(plan)) == rows.tolist()
    again, other = plan_epoch(rows, 5, 3, 1), plan_epoch(rows, 5, 3, 2)
    assert np.array_equal(np.concatenate(plan), np.concatenate(again))
    assert not np.array_equal(np.concatenate(plan), np.concatenate(other))


def test_batches_join_table_rows_to_cache_rows(reader):
    plan = [np.array([0, 3]), np.array([2]), np.array([4, 1])]
    found = list(reader.batches(plan, 0))
    assert [batch.rows.tolist() for batch in found] == [[0, 3], [2], [4, 1]]
    assert found[0].tokens["video"][:, 0, 0].tolist() == [5, 1]
    assert found[0].tokens["audio"][:, 0, 0].tolist() == [15, 11]
    assert found[2].tokens["audio"][:, 1, 2].tolist() == [10, 14]


def test_absent_modality_is_not_present_and_holds_nan(reader):
    (batch,) = reader.batches([np.array([1, 2])], 0)
    assert batch.present.tolist() == [[True, True], [False, True]]
    assert batch.tokens["video"][1].isnan().all()


def test_empty_plan_gives_no_batch(reader):
    assert list(reader.batches([], 0)) == []


def test_error_of_a_reading_thread_reaches_the_training(reader):
    file = reader.stores["audio"].path / "tokens/c/1/0/0/0"
    file.unlink()
    with pytest.raises(CacheError, match="this shard is missing"):
        list(reader.batches([np.array([3]), np.array([0])], 0))
