"""Several writers of one shard: what zarr loses without a word, and that our way of writing does not."""

import multiprocessing

import numpy as np
import pytest
import zarr

N_ROWS, N_WRITERS = 64, 4


def write_rows(path, rows, gate):
    array = zarr.open_array(path, mode="r+")
    gate.wait()
    for row in rows:
        array[row] = np.full(array.shape[1:], row + 1, np.float16)


def rows_left(path):
    """Write every row of one shard, each by one of several processes; return how many are there afterwards."""
    shape = (N_ROWS, 8, 16)
    zarr.create_array(path, shape=shape, shards=shape, chunks=(1, 8, 16), dtype="float16", fill_value=0)
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(N_WRITERS)
    parts = np.array_split(np.arange(N_ROWS), N_WRITERS)
    writers = [context.Process(target=write_rows, args=(path, part, gate)) for part in parts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * N_WRITERS  # nobody was told anything
    return int((zarr.open_array(path, mode="r")[:, 0, 0] == np.arange(N_ROWS) + 1).sum())


@pytest.mark.slow
def test_zarr_loses_rows_in_silence_where_several_write_one_shard(tmp_path):
    """The day that this fails, a shard need not be one process's any more."""
    assert min(rows_left(tmp_path / f"{n}.zarr") for n in range(2)) < N_ROWS


def test_four_commands_that_want_one_shard_lose_nothing_and_make_no_row_twice(start, cache, files_of, tmp_path):
    commands = [start(f"writer{at}", "extract", "--shard-rows", 15) for at in range(N_WRITERS)]
    made = [row for command in commands for row in command.succeeded().made]
    assert len(made) == len({*made}) == 30
    cache.require_sound()
    assert [receipt.name for receipt in cache.receipts] == ["0.json"] * 2
    assert cache.left_over == []
    start("alone", "extract", "--shard-rows", 15, "--cache", tmp_path / "alone").succeeded()
    assert cache.tokens == files_of(tmp_path / "alone").tokens
