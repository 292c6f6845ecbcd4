"""A cache of 1,000,000 clips, simulated with sparse files: how long it takes to open, to plan an epoch, to begin.

    python bench/scale.py [--clips 1000000] [--repeats 5] [--folder DIR] [--json]

Tokens are [300, 1024] float16 in shards of 128 clips, 614 GB that take no room; receipts, states and rows are real.
Each repeat is a fresh process that has imported what it needs; its peak of memory is beside what it held before.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from karmma.data.batches import TokenReader, plan_epoch
from karmma.data.cache import Cache
from karmma.data.clips import read_clips
from karmma.data.config import DataConfig
from karmma.data.identity import input_identity
from karmma.data.modality import PRESENT
from karmma.data.selection import select_stores
from karmma.data.shards import encode_shard, shard_file, state_file
from karmma.data.stores import TokenStore
from pyarrow import parquet

K, WIDTH, SHARD_ROWS, BATCH, NAME = 300, 1024, 128, 32, "0123456789abcdef"
# Steps and the most seconds that are asked for.
ASKED = {"open": 2.0, "plan": 2.0}


def settings(folder: Path) -> DataConfig:
    """Return the settings of the simulated data."""
    return DataConfig(table=folder / "clips.parquet", cache=folder / "cache", heads=("verb",), modalities=("video",))


def simulate(folder: Path, n_clips: int) -> None:
    """Write a table, and a cache with everything but the tokens."""
    rows = np.arange(n_clips)
    columns = {"clip_id": [f"clip_{row:07}" for row in rows], "video": [f"v{row // 100:05}.mp4" for row in rows]}
    columns |= {"start_s": rows % 100 * 3.0, "stop_s": rows % 100 * 3.0 + 2.5}
    columns |= {"split": np.where(rows % 10, "train", "val"), "verb": rows % 97}
    parquet.write_table(pa.table(columns), folder / "clips.parquet")
    data = settings(folder)
    cache = Cache(data.cache)
    cache.add_clips(read_clips(data))
    cache.write_identity("video", NAME, {"input": input_identity("video", data)})
    store = TokenStore.create(cache.tokens_path("video", NAME), (n_clips, 1, K, WIDTH), SHARD_ROWS, {})
    ones = np.zeros((SHARD_ROWS, 1, K, WIDTH), np.float16)
    whole = encode_shard(store.tokens, ones)
    index, digests = whole[-(16 * SHARD_ROWS + 4) :], cache.row_digests().tolist()
    about = {"bytes": len(whole), "sha256": hashlib.sha256(b"").hexdigest(), "state_sha256": "", "failures": []}
    for shard, first in enumerate(range(0, n_clips, SHARD_ROWS)):
        part = digests[first : first + SHARD_ROWS]
        tokens, state = shard_file(store.path / "tokens", shard, 0), state_file(store.path / "state", shard, 0)
        for file in (tokens, state):
            file.parent.mkdir(parents=True, exist_ok=True)
        with open(tokens, "wb") as file:
            file.truncate(len(whole) - len(index))
            file.seek(0, os.SEEK_END)
            file.write(index)
        state.write_bytes(bytes([PRESENT] * len(part)).ljust(SHARD_ROWS, b"\0"))
        receipt = about | {"first_row": first, "rows": part, "counts": {"present": len(part)}}
        receipts = cache.receipts("video", NAME) / "view0"
        receipts.mkdir(parents=True, exist_ok=True)
        (receipts / f"{shard}.json").write_text(json.dumps(receipt, indent=1) + "\n")


def held() -> int:
    """Return the most bytes that this process has held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(folder: Path) -> dict[str, float]:
    """Return seconds by step, and the GiB that they took."""
    data, before, found = settings(folder), held(), {}

    def timed(step: str, start: float) -> None:
        found[step] = time.perf_counter() - start

    start = time.perf_counter()
    cache = Cache.open(data.cache)
    store = TokenStore.open(cache.tokens_path("video", NAME))
    rows = np.flatnonzero(store.state(np.arange(cache.n_clips), 0) == PRESENT)
    timed("open", start)
    start = time.perf_counter()
    plan = plan_epoch(rows, BATCH, seed=0, epoch=0)
    timed("plan", start)
    start = time.perf_counter()
    reader = TokenReader({"video": store}, np.arange(cache.n_clips))
    assert next(iter(reader.batches(plan, 0))).tokens["video"].shape == (BATCH, K, WIDTH)
    timed("first batch", start)
    found["GiB"] = (held() - before) / 2**30
    start = time.perf_counter()
    table = read_clips(data)
    timed("table", start)
    start = time.perf_counter()
    assert select_stores(cache, table, data, {}).n_views == 1
    timed("table against receipts", start)
    found["clips"] = cache.n_clips
    found["GiB, table and all"] = (held() - before) / 2**30
    return found


def main() -> None:
    """Simulate, measure, and print a table or one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the cache is simulated, and stays")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.once:
        print(json.dumps(measure(asked.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = asked.folder or Path(name)
        if asked.folder is None or not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            simulate(folder, asked.clips)
        command = [sys.executable, __file__, "--once", "--folder", str(folder)]
        rounds = [json.loads(subprocess.check_output(command)) for _ in range(asked.repeats)]
        if rounds[0]["clips"] != asked.clips:
            raise SystemExit(f"{folder}: holds {rounds[0]['clips']} clips, not {asked.clips}. Name another folder.")
    found = {step: statistics.median(each[step] for each in rounds) for step in rounds[0]}
    if asked.json:
        print(json.dumps(found))
        return
    for step, value in found.items():
        asked_for = f"s, asked {ASKED[step]:g}" if step in ASKED else "" if "GiB" in step or step == "clips" else "s"
        print(f"{step:24}{value:10.10g} {asked_for}" if step == "clips" else f"{step:24}{value:10.2f} {asked_for}")


if __name__ == "__main__":
    main()
