"""All subsets of modalities from one pass of the backbones against a pass for each subset, at tiny scale.

    python bench/evaluate.py [--clips 48] [--repeats 5] [--json]

The student of the preset `tiny` with V, F and A over clips of the sample data that are decoded already, float32; both
sides take turns in one process; medians, and the median of the ratios of each turn. The largest difference of logits
is printed beside them.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import numpy as np
import torch
from karmma.cli_options import SECTIONS
from karmma.data.clips import read_clip_table
from karmma.data.modality import letters, subsets
from karmma.data.sample import write_sample
from karmma.data.settings import read_preset, resolve
from karmma.distill.stream import ClipStream
from karmma.distill.student import build_student
from karmma.distill.subsets import BATCH, subset_logits
from torch import Tensor

M = ("video", "flow", "audio")
ASKED = 3.0


class Decoded:
    """A stream whose batches are in memory."""

    def __init__(self, stream: ClipStream, rows: np.ndarray) -> None:
        wanted = np.ones((len(rows), len(M)), bool)
        plan = [(rows[at : at + BATCH], wanted[at : at + BATCH]) for at in range(0, len(rows), BATCH)]
        self.held, self.failed = list(stream.batches(plan, 0)), stream.failed

    def batches(self, plan: list, view: int) -> list:
        """Return the batches that were read."""
        return self.held


def plainly(student: torch.nn.Module, stream: Decoded) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """Run the whole student once for each subset, on the modalities of the subset."""
    out = {}
    with torch.inference_mode():
        for subset in subsets(M):
            mask, parts = torch.tensor([modality in subset for modality in M]), []
            for batch in stream.held:
                inputs = {m: values for m, values in batch.inputs.items() if m in subset}
                parts.append(student(inputs, batch.present & mask).logits)
            out[subset] = {head: torch.cat([part[head] for part in parts]) for head in parts[0]}
    return out


def main() -> None:
    """Time both sides in turns and print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    settings = resolve(SECTIONS, ("preset", read_preset("tiny")), ("bench", {"data": {"modalities": M}}))
    data = settings["data"]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_sample(Path(folder), n_clips=asked.clips)
        table = read_clip_table(Path(folder) / "clips.csv", data.heads)
        student = build_student(data, settings["student"], {head: len(table.classes(head)) for head in data.heads})
        student.eval()
        with ClipStream(table, data, M) as stream:
            rows = np.arange(table.n_clips)
            decoded = Decoded(stream, rows)
    ways = {
        "once": lambda: subset_logits(student, decoded, rows, subsets(M), torch.device("cpu")).logits,
        "plain": lambda: plainly(student, decoded),
    }
    found = {name: way() for name, way in ways.items()}
    off = max((found["once"][s][h] - found["plain"][s][h]).abs().max().item() for s in subsets(M) for h in data.heads)
    turns = []
    for _ in range(asked.repeats):
        turns.append({})
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            turns[-1][name] = time.perf_counter() - start
    medians = {name: statistics.median(turn[name] for turn in turns) for name in ways}
    ratio = statistics.median(turn["plain"] / turn["once"] for turn in turns)
    if asked.json:
        print(json.dumps({**medians, "ratio": ratio, "asked": ASKED, "off": off}))
        return
    missed = "" if ratio >= ASKED else "  MISSED"
    print(f"{asked.clips} clips, {len(subsets(M))} subsets of {letters(M)}: once {medians['once']:.2f} s, ", end="")
    print(f"a pass each {medians['plain']:.2f} s, {ratio:.2f}x (asked: {ASKED}x){missed}, logits {off:.1e} apart")


if __name__ == "__main__":
    main()
