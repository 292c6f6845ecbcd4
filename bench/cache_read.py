"""Shuffled batches of 32 clips from a cache of 2,048: our reader against the memory's limit and against libraries.

    python bench/cache_read.py [--repeats 5] [--clips 2048] [--folder DIR] [--json]

Tokens are [300, 1024] float16, 614 KB a clip; the files are in the page cache.  Every way reads every clip once, in
batches of one and the same shuffled plan (WebDataset: in the order its own shuffling gives), in a fresh process that
has imported what it needs: opening the files counts, starting Python does not.  Ways take turns, so that a busy machine
is busy for all of them; medians are printed.  Every way has its values checked against those that were written.

The limit is `memmap`: torch.index_select from a mapped array into a buffer that is used again.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

K, WIDTH, BATCH, SHARD_ROWS, SEED = 300, 1024, 32, 64, 0
# What each ratio is held against, and the least that is asked for.
RATIOS = {
    "of_limit": ("karmma", "memmap", 0.9),
    "over_h5py": ("karmma", "h5py", 1.2),
    "over_tensorstore": ("karmma", "tensorstore", 2),
    "over_webdataset": ("karmma", "webdataset", 10),
    "over_zarr": ("karmma", "zarr", 10),
    "over_dataloader": ("karmma", "dataloader over zarr", 10),
}


def clip(row: int) -> np.ndarray:
    """Return tokens [K, WIDTH] that no other row has."""
    tokens = np.random.default_rng(0).standard_normal((K, WIDTH), np.float32).astype(np.float16)
    tokens[0, 0] = row
    return tokens


def write_all(folder: Path, n_clips: int) -> None:
    """Write the same clips in every format."""
    import h5py
    from karmma.data.stores import TokenStore

    tokens = np.stack([clip(0)] * SHARD_ROWS)
    store = TokenStore.create(folder / "tokens.zarr", (n_clips, 1, K, WIDTH), SHARD_ROWS, {})
    with h5py.File(folder / "tokens.h5", "w") as file, open(folder / "tokens.bin", "wb") as flat:
        dataset = file.create_dataset("tokens", (n_clips, K, WIDTH), "f2", chunks=(1, K, WIDTH))
        for shard, first in enumerate(range(0, n_clips, SHARD_ROWS)):
            tokens[:, 0, 0] = np.arange(first, first + SHARD_ROWS)
            store.write_shard(shard, 0, tokens, np.ones(SHARD_ROWS, np.uint8))
            dataset[first : first + SHARD_ROWS] = tokens
            flat.write(tokens.tobytes())
            with tarfile.open(folder / f"tokens-{shard:04}.tar", "w") as tar:
                for row, values in enumerate(tokens, first):
                    data = io.BytesIO()
                    np.save(data, values)
                    member = tarfile.TarInfo(f"{row:06}.npy")
                    member.size = data.tell()
                    tar.addfile(member, io.BytesIO(data.getvalue()))


def plan(n_clips: int) -> list[np.ndarray]:
    """Return the rows of every batch."""
    rows = np.random.default_rng(SEED).permutation(n_clips)
    return [rows[at : at + BATCH] for at in range(0, n_clips, BATCH)]


def buffer() -> np.ndarray:
    """Return memory for one batch."""
    return np.zeros((BATCH, K, WIDTH), np.float16)


def with_karmma(folder: Path, n_clips: int) -> Callable[[], Iterator]:
    """Read as training does: two threads, one batch ahead."""
    from karmma.data.batches import TokenReader
    from karmma.data.stores import TokenStore

    def read() -> Iterator:
        reader = TokenReader({"video": TokenStore.open(folder / "tokens.zarr")}, np.arange(n_clips))
        return (batch.tokens["video"] for batch in reader.batches(plan(n_clips), 0))

    return read


def with_one_thread(folder: Path, n_clips: int) -> Callable[[], Iterator]:
    """Read each batch where it is asked for, with TokenStore.read."""
    from karmma.data.stores import TokenStore

    def read() -> Iterator:
        store, out = TokenStore.open(folder / "tokens.zarr"), buffer()
        return (store.read(rows, 0, out) for rows in plan(n_clips))

    return read


def with_memmap(folder: Path, n_clips: int) -> Callable[[], Iterator]:
    """Read from a mapped file with torch.index_select."""

    def read() -> Iterator:
        size = n_clips * K * WIDTH
        mapped = torch.from_file(str(folder / "tokens.bin"), shared=True, size=size, dtype=torch.float16)
        mapped, out = mapped.reshape(n_clips, K, WIDTH), torch.from_numpy(buffer())
        return (torch.index_select(mapped, 0, torch.from_numpy(rows), out=out) for rows in plan(n_clips))

    return read


def with_h5py(folder: Path, n_clips: int) -> Callable[[], Iterator]:
    """Read clip by clip into a buffer with read_direct, one chunk a clip, no chunk cache in between."""
    import h5py

    def read() -> Iterator:
        dataset, out = h5py.File(folder / "tokens.h5", rdcc_nbytes=0)["tokens"], buffer()
        for rows in plan(n_clips):
            for at, row in enumerate(rows.tolist()):
                dataset.read_direct(out, np.s_[row], np.s_[at])
            yield out

    return read


def with_tensorstore(folder: Path, n_clips: int) -> Callable[[], Iterator]:
    """Read our own store, a batch at a time, with tensorstore's threads."""
    import tensorstore

    def read() -> Iterator:
        where = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "tokens.zarr/tokens")}}
        array = tensorstore.open(where, read=True).result()
        return (array[rows, 0].read().result() for rows in plan(n_clips))

    return read


def with_webdataset(folder: Path, n_clips: int) -> Callable[[], Iterator]:
    """Read tar files, their order and then 256 clips at a time shuffled."""
    import webdataset

    def read() -> Iterator:
        files = sorted(map(str, folder.glob("*.tar")))
        stream = webdataset.WebDataset(files, shardshuffle=len(files), seed=SEED).shuffle(256).decode()
        return (batch[0] for batch in stream.to_tuple("npy").batched(BATCH))

    return read


def with_zarr(folder: Path, n_clips: int) -> Callable[[], Iterator]:
    """Read clip by clip with zarr."""
    import zarr

    def read() -> Iterator:
        array, out = zarr.open_array(folder / "tokens.zarr/tokens", mode="r"), buffer()
        for rows in plan(n_clips):
            for at, row in enumerate(rows.tolist()):
                out[at] = array[row, 0]
            yield out

    return read


class ZarrRows(torch.utils.data.Dataset):
    """A data set as one writes it first: item by item from zarr."""

    def __init__(self, path: Path) -> None:
        import zarr

        self.array = zarr.open_array(path, mode="r")

    def __len__(self) -> int:
        return self.array.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        return self.array[row, 0]


def with_dataloader(folder: Path, n_clips: int) -> Callable[[], Iterator]:
    """Read with torch's DataLoader and two worker processes over zarr."""

    def read() -> Iterator:
        rows = ZarrRows(folder / "tokens.zarr/tokens")
        how = {"num_workers": 2, "multiprocessing_context": "forkserver"}
        return iter(torch.utils.data.DataLoader(rows, batch_sampler=[b.tolist() for b in plan(n_clips)], **how))

    return read


WAYS = {
    "karmma": with_karmma,
    "karmma, one thread": with_one_thread,
    "memmap": with_memmap,
    "h5py": with_h5py,
    "tensorstore": with_tensorstore,
    "webdataset": with_webdataset,
    "zarr": with_zarr,
    "dataloader over zarr": with_dataloader,
}


def time_one(way: str, folder: Path, n_clips: int) -> float:
    """Return clips a second of one pass; raises SystemExit if a value is wrong."""
    read = WAYS[way](folder, n_clips)
    expected, numbers = clip(0)[-1, -1], []
    start = time.perf_counter()
    for batch in read():
        numbers.append(np.asarray(batch[:, 0, 0]).copy())
        if not (np.asarray(batch[:, -1, -1]) == expected).all():
            raise SystemExit(f"{way}: wrong values")
    seconds = time.perf_counter() - start
    found, wanted = np.concatenate(numbers), np.concatenate(plan(n_clips)).astype(np.float16)
    if way == "webdataset":
        found, wanted = np.sort(found), np.sort(wanted)
    if not np.array_equal(found, wanted):
        raise SystemExit(f"{way}: wrong clips")
    return n_clips / seconds


def in_fresh_process(way: str, folder: Path, n_clips: int) -> float:
    """Do as `time_one` in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--clips", str(n_clips), "--way", way]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Write the files, let the ways take turns, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clips", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="where the files are written, and left for another time")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        print(time_one(asked.way, asked.folder, asked.clips))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = asked.folder or Path(name)
        if not (folder / "tokens.bin").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_all(folder, asked.clips)
        rounds = [{way: in_fresh_process(way, folder, asked.clips) for way in WAYS} for _ in range(asked.repeats)]
    rates = {way: statistics.median(found[way] for found in rounds) for way in WAYS}
    # A ratio is of one round, where both ran within seconds of each other.
    ratios = {
        name: statistics.median(found[ours] / found[other] for found in rounds)
        for name, (ours, other, _) in RATIOS.items()
    }
    if asked.json:
        print(json.dumps({"clips_per_s": rates, **ratios}))
        return
    print(f"{'way':22}{'clips/s':>9}{'GB/s':>7}")
    for way, rate in rates.items():
        print(f"{way:22}{rate:9.0f}{rate * K * WIDTH * 2 / 1e9:7.2f}")
    print(f"\n{'ratio':22}{'found':>9}{'asked':>7}")
    for name, (_, _, least) in RATIOS.items():
        print(f"{name:22}{ratios[name]:9.2f}{least:7}")


if __name__ == "__main__":
    main()
