"""How long a model takes for one clip, and how much memory, by the modalities that are there."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..data.device import enough_memory
from ..data.errors import ConfigError, MemoryShortError
from ..data.modality import subsets
from .blueprint import Blueprint, blank_clip
from .efficiency import Efficiency
from .model import ClipModel

ONLY_COUNT = "Report with --repeats 0, which only counts."


def measure(
    blueprint: Blueprint, found: Efficiency, device: torch.device, repeats: int, advance: Callable[[int], None]
) -> Efficiency:
    """Run the whole model on one clip for each subset, in float32; return `found` with latencies and peak memory.

    repeats: timed passes of each subset, after one that is not timed.  advance: called with 1 after each subset.
    Raises MemoryShortError, and ConfigError for the meta device.
    """
    if device.type == "meta":
        raise ConfigError("device = 'meta': nothing is computed there. Use auto or cpu.")
    rows, spawn = [], multiprocessing.get_context("spawn")
    for row, subset in zip(found.rows, subsets(blueprint.modalities), strict=True):
        # A process each: memory that was used before would be used again, and not seen to be.
        with ProcessPoolExecutor(1, spawn) as fresh:
            try:
                seconds, peak_bytes = fresh.submit(_measured, blueprint, subset, device, repeats).result()
            except BrokenProcessPool:
                raise MemoryShortError(
                    f"{blueprint.name}, {row.subset}: the process that measured it was killed, most likely because the "
                    f"memory ran out. {ONLY_COUNT}"
                ) from None
        rows.append(replace(row, seconds=seconds, peak_bytes=peak_bytes))
        advance(1)
    return replace(found, rows=tuple(rows), device=str(device))


@torch.inference_mode()
def _measured(
    blueprint: Blueprint, subset: tuple[str, ...], device: torch.device, repeats: int
) -> tuple[float, int | None]:
    """Return the median seconds of a pass and the peak of memory, in a process where nothing else has happened."""
    before = _status("VmRSS")
    with enough_memory(f"{blueprint.name} on {device}", ONLY_COUNT):
        model = blueprint.build().to(device).eval()
        inputs = {m: blank_clip(model.backbones[m]).to(device) for m in subset}
        present = torch.tensor([[m in subset for m in model.modalities]], device=device)
        _forget_peak(device)
        seconds = [_pass(model, inputs, present, device) for _ in range(1 + repeats)][1:]
    return statistics.median(seconds), _peak_bytes(device, before)


def _pass(model: ClipModel, inputs: Mapping[str, Tensor], present: Tensor, device: torch.device) -> float:
    """Run the model once; return seconds."""
    start = time.perf_counter()
    model(inputs, present)
    if device.type in ("cuda", "mps"):  # these go on by themselves
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - start


def _status(name: str) -> int | None:
    """Return a figure in bytes that Linux keeps of this process; None elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")]
    return found[0] if found else None


def _forget_peak(device: torch.device) -> None:
    """Begin to look for the largest use of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux only: the peak starts from what is in use; else from the start of the process
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak_bytes(device: torch.device, before: int | None) -> int | None:
    """Return the largest use of memory since then; on a CPU that of the process, beyond `before`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _status("VmHWM")
    return None if peak is None or before is None else max(peak - before, 0)
