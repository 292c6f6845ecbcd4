"""Extraction of Swin3D-T at 32 x 224 x 224: against a plain loop, against its own forward passes, and when all is done.

    python bench/extract.py [--clips 24] [--repeats 3] [--precision float32] [--rerun-clips 67217] [--json]

The clips are cut out of one five-minute video, as in `bench/decode.py`; weights are random, the same in every way.
  plain    float32, eager torchvision, a clip at a time: seek, decode, forward, average, write with zarr
  karmma   `extract_tokens` into an empty cache: building the backbone and starting the readers included
  forward  the passes of that same backbone alone, on arrays that are in memory already
Ways take turns, each in a fresh process that has imported what it needs; medians of the ratios of one turn are printed.

The rerun is `karmma extract`, Python's start included, over a complete cache that is simulated: a table of its clips,
a receipt for each shard, and files of the right size that hold nothing.
"""

import argparse
import csv
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import numpy as np
import torch
import zarr
from decode import by_plain_pyav, cut_clips, draw_video
from karmma.data.cache import Cache
from karmma.data.clips import read_clips
from karmma.data.config import DataConfig
from karmma.data.shards import shard_file, state_file
from karmma.data.stores import TokenStore
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.frozen import FrozenBackbone, build_frozen
from karmma.extract.stage import extract_tokens, open_stores

THETA, SWIN = 300, BackboneConfig(name="swin3d_t", weights="none")
# Ratio -> what is asked for: at least, or at most.
ASKED = {"over_plain": ">= 2.8", "cosine": ">= 0.9995", "over_forward": "<= 1.08", "rerun_s": "< 5"}


def settings(folder: Path, precision: str, shard_rows: int = 8) -> tuple[DataConfig, ExtractConfig]:
    """Return the settings of every way; shards small enough that more than one is written."""
    data = DataConfig(table=folder / "clips.csv", heads=("verb",), modalities=("video",), cache=folder / "cache")
    config = ExtractConfig(video=SWIN, theta=THETA, batch_size=1, shard_rows=shard_rows, precision=precision)
    return data, config


def write_table(folder: Path, rows: list[tuple[str, str, float, float]]) -> None:
    """Write clips.csv: clip, video, start and stop."""
    with open(folder / "clips.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("clip_id", "video", "start_s", "stop_s", "split", "verb"))
        writer.writerows((*row, "train", "a") for row in rows)


def by_plain_loop(folder: Path, precision: str) -> float:
    """Do as one writes it first; return seconds."""
    from torchvision.models.video import swin3d_t

    data, config = settings(folder, "float32")
    table = read_clips(data)
    start = time.perf_counter()
    ours, model = build_frozen("video", data, config), swin3d_t(weights=None).eval()
    model.load_state_dict(ours.state_dict(), strict=False)
    shape = (table.n_clips, THETA, ours.width)
    out = zarr.create_array(folder / "plain.zarr", shape=shape, chunks=(1, *shape[1:]), dtype="float16", overwrite=True)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        for row in range(table.n_clips):
            (array,) = by_plain_pyav([table.clip(row)])
            x = (torch.from_numpy(array)[None].transpose(1, 2).float() / 255 - mean) / std
            tokens = model.norm(model.features(model.patch_embed(x))).flatten(1, 3)[0]
            group = len(tokens) // THETA
            parts = [tokens[i * group : (i + 1) * group] for i in range(THETA - 1)] + [tokens[(THETA - 1) * group :]]
            out[row] = torch.stack([part.mean(0) for part in parts]).numpy().astype(np.float16)
    return time.perf_counter() - start


def by_karmma(folder: Path, precision: str) -> float:
    """Extract into an empty cache; return seconds."""
    data, config = settings(folder, precision)
    data = data.model_copy(update={"cache": folder / f"cache-{os.getpid()}"})
    table = read_clips(data)
    start = time.perf_counter()
    report = extract_tokens(table, data, config)
    seconds = time.perf_counter() - start
    (folder / "ours").unlink(missing_ok=True)
    (folder / "ours").symlink_to(report.stores["video"])
    return seconds


def by_forward(folder: Path, precision: str) -> float:
    """Run the backbone over clips that are in memory; return seconds."""
    data, config = settings(folder, precision)
    table = read_clips(data)
    arrays = by_plain_pyav([table.clip(row) for row in range(table.n_clips)])
    backbone = FrozenBackbone("video", build_frozen("video", data, config), config, torch.device("cpu"))
    start = time.perf_counter()
    for array in arrays:
        backbone.tokens({0: array})
    return time.perf_counter() - start


WAYS: dict[str, Callable[[Path, str], float]] = {"plain": by_plain_loop, "karmma": by_karmma, "forward": by_forward}


def in_fresh_process(way: str, folder: Path, precision: str) -> float:
    """Do as the way does, in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder), "--precision", precision]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def least_cosine(folder: Path) -> float:
    """Return the least cosine of a token to the plain loop's."""
    plain = np.asarray(zarr.open_array(folder / "plain.zarr", mode="r")[:], np.float32)
    ours = TokenStore.open((folder / "ours").resolve()).read(np.arange(len(plain)), 0).astype(np.float32)
    norms = np.linalg.norm(plain, axis=2) * np.linalg.norm(ours, axis=2)
    return float(((plain * ours).sum(2) / norms).min())


def simulate(folder: Path, n_clips: int) -> None:
    """Write a table of clips, and a cache that looks complete to whoever does not read its shards."""
    folder.mkdir()
    (folder / "none.mp4").touch()
    write_table(folder, [(f"clip_{row:06}", "none.mp4", row, row + 2.5) for row in range(n_clips)])
    data, config = settings(folder, "float32", ExtractConfig().shard_rows)
    cache = Cache(data.cache)
    cache.add_clips(read_clips(data))
    store = open_stores(cache, data, config)["video"]
    digests, empty = cache.row_digests().tolist(), hashlib.sha256(b"").hexdigest()
    for shard, first in enumerate(range(0, n_clips, config.shard_rows)):
        for file in (shard_file(store.path / "tokens", shard, 0), state_file(store.path / "state", shard, 0)):
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "wb") as opened:
                opened.truncate(config.shard_rows)
        part = digests[first : first + config.shard_rows]
        receipt = {"bytes": config.shard_rows, "sha256": empty, "state_sha256": empty, "first_row": first, "rows": part}
        receipt |= {"counts": {"present": len(part)}, "failures": []}
        cache.write_receipt("video", store.path.stem, 0, shard, receipt)


SETTINGS = """
[data]
table = "clips.csv"
heads = ["verb"]
modalities = ["video"]
[extract]
video = {name = "swin3d_t", weights = "none"}
"""


def rerun_s(folder: Path) -> float:
    """Return the seconds in which `karmma extract` finds that nothing is to do; raises SystemExit if something is."""
    (folder / "karmma.toml").write_text(SETTINGS)
    code = "import sys; from karmma.cli import main; sys.argv = ['karmma', 'extract']; main()"
    start = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if "Nothing to do" not in found.stderr:
        raise SystemExit(f"The simulated cache did not count as complete:\n{found.stderr}")
    return seconds


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, float]:
    """Return seconds by way and all ratios."""
    draw_video(folder / "long.mp4")
    clips = cut_clips(folder / "long.mp4")[: asked.clips]
    write_table(folder, [(clip.clip_id, "long.mp4", clip.start_s, clip.stop_s) for clip in clips])
    rounds = [{way: in_fresh_process(way, folder, asked.precision) for way in WAYS} for _ in range(asked.repeats)]
    simulate(folder / "simulated", asked.rerun_clips)
    return {
        **{f"{way}_s": statistics.median(found[way] for found in rounds) for way in WAYS},
        "over_plain": statistics.median(found["plain"] / found["karmma"] for found in rounds),
        "cosine": least_cosine(folder),
        "over_forward": statistics.median(found["karmma"] / found["forward"] for found in rounds),
        "rerun_s": statistics.median(rerun_s(folder / "simulated") for _ in range(asked.repeats)),
    }


def main() -> None:
    """Measure, and print a table or one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24, help="at most 60")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rerun-clips", type=int, default=67217)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        print(WAYS[asked.way](asked.folder, asked.precision))
        return
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), asked)
    if asked.json:
        print(json.dumps({"precision": asked.precision, **found}))
        return
    for way in WAYS:
        print(f"{way:14}{found[f'{way}_s'] / asked.clips:9.2f} s a clip")
    print(f"\n{'ratio':14}{'found':>9}  asked")
    for name, least in ASKED.items():
        print(f"{name:14}{found[name]:9.4g}  {least}")


if __name__ == "__main__":
    main()
