"""What a model costs: parameters, operations, latency and memory, by the modalities that are there.

One multiply-add is two operations, of matrix products and convolutions only, as in the published figures.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..data.config import DataConfig
from ..data.device import enough_memory
from ..data.errors import ConfigError, RunError
from ..data.modality import letters, subsets
from ..data.runs import RunFolder
from ..data.theta import theta_average
from ..extract.config import BackboneConfig, ExtractConfig
from ..extract.weights import shown_name
from ..fuse.config import TeacherConfig, TrainingConfig
from ..fuse.model import build_fusion
from .config import StudentConfig
from .model import ClipModel, build_model

EPIC = {"verb": 97, "noun": 300}  # classes of EPIC-KITCHENS-100, the heads of the published figures


@dataclass(frozen=True)
class Blueprint:
    """All that decides what a model costs.

    is_frozen: whether the backbones are, as a teacher's: then only what follows them is trained.
    """

    name: str
    data: DataConfig
    backbones: Mapping[str, BackboneConfig]
    theta: int | None
    config: TrainingConfig
    n_classes: Mapping[str, int]
    is_frozen: bool

    def build(self) -> ClipModel:
        """Build the model with random weights: they do not matter here."""
        return build_model(self.data, self.backbones, self.theta, self.n_classes, self.config, pretrained=False)


@dataclass(frozen=True)
class Cost:
    """What one subset of the modalities costs, for one clip.

    alone: trained parameters of such a model built for these modalities only.
    gflops: where a missing modality adds no tokens.  gflops_as_run: with what stands in for it.
    seconds, peak_bytes: median latency, and memory beside what the process had before the model was built; None if
    not measured, or not to be known here.
    """

    subset: str
    alone: int
    gflops: float
    gflops_as_run: float
    seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Efficiency:
    """Parameters of a model, and its cost by subset, the largest subset first.

    by_theta: tokens kept, or 'none' for all -> subset -> GFLOPs where a missing modality adds no tokens.
    """

    name: str
    trained: int
    frozen: int
    theta: int | None
    rows: tuple[Cost, ...]
    by_theta: Mapping[str, Mapping[str, float]]
    device: str | None = None


def teacher_blueprint(
    data: DataConfig, extract: ExtractConfig, config: TeacherConfig, n_classes: Mapping[str, int]
) -> Blueprint:
    """Return the teacher that some settings describe."""
    backbones = {modality: getattr(extract, modality) for modality in data.modalities}
    return Blueprint("teacher", data, backbones, extract.theta, config, n_classes, is_frozen=True)


def student_blueprint(data: DataConfig, config: StudentConfig, n_classes: Mapping[str, int]) -> Blueprint:
    """Return the student that some settings describe."""
    backbones = {modality: getattr(config, modality) for modality in config.modalities or data.modalities}
    return Blueprint("student", data, backbones, config.theta, config, n_classes, is_frozen=False)


def run_blueprint(run: RunFolder, extract: ExtractConfig) -> Blueprint:
    """Return what a finished run trained.

    extract: names the backbones behind a teacher's tokens; its run knows which they were.  Raises ConfigError if
    they are others, RunError if the tokens were imported, and nobody here knows what they cost to make.
    """
    described = run.config
    data = DataConfig.model_validate(described["data"])
    n_classes = {head: len(names) for head, names in described["classes"].items()}
    if described["kind"] == "student":
        found = student_blueprint(data, StudentConfig.model_validate(described["settings"]), n_classes)
        return replace(found, name=run.path.name)
    made_by = described["made_by"]
    for modality, made in made_by.items():
        if made["name"] == "imported":
            raise RunError(f"{run.path}: its {modality} tokens were imported: nobody here knows what they cost.")
        chosen = shown_name(getattr(extract, modality).name)
        if chosen != made["name"]:
            raise ConfigError(
                f"{run.path}: its {modality} tokens are of {made['name']}, extract.{modality} names {chosen}. "
                "Report under the settings that the cache was made with."
            )
    thetas = {made["theta"] for made in made_by.values()}
    if len(thetas) != 1:
        raise RunError(f"{run.path}: its modalities were averaged to different numbers of tokens: {thetas}.")
    data = data.model_copy(update={"modalities": tuple(made_by)})
    extract = extract.model_copy(update={"theta": thetas.pop()})
    found = teacher_blueprint(data, extract, TeacherConfig.model_validate(described["settings"]), n_classes)
    return replace(found, name=run.path.name)


def count(blueprint: Blueprint, thetas: Sequence[int | None] = ()) -> Efficiency:
    """Count parameters and operations on the meta device, where nothing is computed.

    thetas: the Theta-Average values of `Efficiency.by_theta`.
    """
    with torch.device("meta"):
        model = blueprint.build()
        flops = {m: _operations(backbone, _inputs(blueprint, m)) for m, backbone in model.backbones.items()}
    sizes = {m: _n_parameters(backbone) for m, backbone in model.backbones.items()}
    frozen = sum(sizes.values()) if blueprint.is_frozen else 0
    rows = []
    for subset in subsets(model.modalities):
        reading = sum(flops[m] for m in subset)
        fusion, alone = _fusing(blueprint, model, subset, blueprint.theta)
        as_run = _operations(model.fusion, *_tokens(model, subset, blueprint.theta))
        alone += 0 if blueprint.is_frozen else sum(sizes[m] for m in subset)
        rows.append(Cost(letters(subset), alone, (reading + fusion) / 1e9, (reading + as_run) / 1e9))
    by_theta = {
        str(theta or "none"): {
            letters(subset): (sum(flops[m] for m in subset) + _fusing(blueprint, model, subset, theta)[0]) / 1e9
            for subset in subsets(model.modalities)
        }
        for theta in thetas
    }
    trained = _n_parameters(model) - frozen
    return Efficiency(blueprint.name, trained, frozen, blueprint.theta, tuple(rows), by_theta)


def measure(
    blueprint: Blueprint, found: Efficiency, device: torch.device, repeats: int, advance: Callable[[int], None]
) -> Efficiency:
    """Run the whole model on one clip for each subset, in float32; return `found` with latencies and peak memory.

    repeats: timed passes of each subset, after one that is not timed.  advance: called with 1 after each subset.
    Raises MemoryShortError.
    """
    rows, spawn = [], multiprocessing.get_context("spawn")
    for row, subset in zip(found.rows, subsets(blueprint.backbones), strict=True):
        # A process each: memory that was used before would be used again, and not seen to be.
        with ProcessPoolExecutor(1, spawn) as fresh:
            seconds, peak_bytes = fresh.submit(_measured, blueprint, subset, device, repeats).result()
        rows.append(replace(row, seconds=seconds, peak_bytes=peak_bytes))
        advance(1)
    return replace(found, rows=tuple(rows), device=str(device))


@torch.inference_mode()
def _measured(
    blueprint: Blueprint, subset: tuple[str, ...], device: torch.device, repeats: int
) -> tuple[float, int | None]:
    """Return the median seconds of a pass and the peak of memory, in a process where nothing else has happened."""
    before = _status("VmRSS")
    with enough_memory(f"{blueprint.name} on {device}", "Report with --repeats 0, which only counts."):
        model = blueprint.build().to(device).eval()
        inputs = {m: _inputs(blueprint, m).to(device) for m in subset}
        present = torch.tensor([[m in subset for m in model.modalities]], device=device)
        _forget_peak(device)
        seconds = [_pass(model, inputs, present, device) for _ in range(1 + repeats)][1:]
    return statistics.median(seconds), _peak_bytes(device, before)


def _pass(model: ClipModel, inputs: Mapping[str, Tensor], present: Tensor, device: torch.device) -> float:
    """Run the model once; return seconds."""
    start = time.perf_counter()
    model(inputs, present)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _inputs(blueprint: Blueprint, modality: str) -> Tensor:
    """Return one clip of a modality, [1, ...], of zeros; on the default device."""
    return torch.zeros(1, *blueprint.data.input_shape(modality))


def _tokens(model: ClipModel, subset: tuple[str, ...], theta: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """Return one clip's tokens on the meta device as the fusion block takes them, and `present`."""
    present = torch.tensor([[m in subset for m in model.modalities]], device="cpu")
    backbones = {m: model.backbones[m] for m in subset}
    tokens = {m: torch.empty(1, each.n_tokens, each.width, device="meta") for m, each in backbones.items()}
    return {m: theta_average(values, theta) if theta else values for m, values in tokens.items()}, present


def _fusing(
    blueprint: Blueprint, model: ClipModel, subset: tuple[str, ...], theta: int | None
) -> tuple[int, int]:
    """Return operations of fusing a subset when nothing else is there, and parameters of the model for it alone."""
    tokens, _ = _tokens(model, subset, theta)
    widths = {m: values.shape[2] for m, values in tokens.items()}
    n_tokens = {m: values.shape[1] for m, values in tokens.items()}
    with torch.device("meta"):
        bare = build_fusion(widths, n_tokens, blueprint.n_classes, blueprint.config, missing="ignore")
        alone = build_fusion(widths, n_tokens, blueprint.n_classes, blueprint.config)
    every = torch.ones(1, len(subset), dtype=torch.bool, device="cpu")
    return _operations(bare, tokens, every), _n_parameters(alone)


def _operations(module: nn.Module, *inputs: Any) -> int:
    """Return the operations of one pass; attention is taken apart into its two products, so that both are seen."""
    module.eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def _n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: the peak starts from what is in use


def _peak_bytes(device: torch.device, before: int | None) -> int | None:
    """Return the largest use of memory since then; on a CPU that of the process, beyond `before`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _status("VmHWM")
    return None if peak is None or before is None else max(peak - before, 0)
