"""What it is worth that freed memory is kept: steps of a small student, with and without, in turns.

    python bench/memory.py [--repeats 7] [--steps 30]

Every measurement is a process of its own, in one thread; random clips of 8 x 84 x 84 in batches of 16.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

SHAPE, BATCH, WARM_UP = (8, 3, 84, 84), 16, 3


def steps(n_steps: int, is_kept: bool) -> float:
    """Return the seconds of a training step of one backbone, in this process."""
    import torch
    from karmma.cli import keep_freed_memory
    from karmma.extract.backbones import build_backbone

    if is_kept:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = build_backbone("swin3d_micro_p14", "flow", SHAPE)
    optimizer = torch.optim.AdamW(backbone.parameters())
    clips = torch.rand(BATCH, *SHAPE) * 255
    for step in range(n_steps + WARM_UP):
        if step == WARM_UP:
            start = time.perf_counter()
        optimizer.zero_grad()
        backbone(clips + 0).square().mean().backward()  # a batch is new memory each time
        optimizer.step()
    return (time.perf_counter() - start) / n_steps


def main() -> None:
    """Measure both in turns; print medians and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--one", choices=("kept", "given-back"), help="measure one of them once, in this process")
    asked = parser.parse_args()
    if asked.one:
        print(steps(asked.steps, asked.one == "kept"))
        return
    found: dict[str, list[float]] = {"given-back": [], "kept": []}
    for _ in range(asked.repeats):
        for how, seconds in found.items():
            command = [sys.executable, __file__, "--steps", str(asked.steps), "--one", how]
            seconds.append(float(subprocess.check_output(command, text=True)))
    ratio = statistics.median(before / after for before, after in zip(*found.values(), strict=True))
    for how, seconds in found.items():
        print(f"freed memory {how}: {1000 * statistics.median(seconds):.0f} ms a step")
    print(f"{ratio:.2f}x")


if __name__ == "__main__":
    main()
