"""What a model costs: parameters and operations, by the modalities that are there.

One multiply-add is two operations, of matrix products and convolutions only, as in the published figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..data.modality import letters, subsets
from ..data.theta import theta_average
from ..fuse.model import FusionModel, build_fusion
from .blueprint import Blueprint, blank_clip
from .model import ClipModel


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

    missing: strategy of the model, which `Cost.gflops_as_run` depends on.  imported: modalities whose backbones are not
    known and not counted.  n_classes: head -> classes.
    by_theta: tokens kept, or 'none' for all -> subset -> GFLOPs where a missing modality adds no tokens.
    """

    name: str
    trained: int
    frozen: int
    theta: int | None
    missing: str
    imported: tuple[str, ...]
    n_classes: Mapping[str, int]
    rows: tuple[Cost, ...]
    by_theta: Mapping[str, Mapping[str, float]]
    device: str | None = None


def count(blueprint: Blueprint, thetas: Sequence[int | None] = (), whole_only: bool = False) -> Efficiency:
    """Count parameters and operations on the meta device, where nothing is computed.

    thetas: the Theta-Average values of `Efficiency.by_theta`.  whole_only: leave out the smaller subsets.
    """
    with torch.device("meta"):
        model = blueprint.build()
        flops = {m: _operations(backbone, blank_clip(backbone)) for m, backbone in model.backbones.items()}
    chosen = subsets(model.modalities)[: 1 if whole_only else None]
    sizes = {m: _n_parameters(backbone) for m, backbone in model.backbones.items()}
    frozen = sum(sizes.values()) if blueprint.is_frozen else 0
    gflops: dict[int | None, dict[str, float]] = {}
    for theta in {blueprint.theta, *thetas}:
        gflops[theta] = {}
        for subset in chosen:
            bare, tokens = _fusion(blueprint, model, subset, theta, missing="ignore")
            every = torch.ones(1, len(subset), dtype=torch.bool, device="cpu")
            operations = sum(flops[m] for m in subset) + _operations(bare, tokens, every)
            gflops[theta][letters(subset)] = operations / 1e9
    rows = []
    for subset in chosen:
        present = torch.tensor([[m in subset for m in model.modalities]], device="cpu")
        alone, tokens = _fusion(blueprint, model, subset, blueprint.theta)
        as_run = sum(flops[m] for m in subset) + _operations(model.fusion, tokens, present)
        trained = _n_parameters(alone) + (0 if blueprint.is_frozen else sum(sizes[m] for m in subset))
        name = letters(subset)
        rows.append(Cost(name, trained, gflops[blueprint.theta][name], as_run / 1e9))
    return Efficiency(
        blueprint.name,
        _n_parameters(model) - frozen,
        frozen,
        blueprint.theta,
        model.fusion.embedding.missing,
        tuple(blueprint.imported),
        dict(blueprint.n_classes),
        tuple(rows),
        {str(theta or "none"): gflops[theta] for theta in thetas},
    )


def _fusion(
    blueprint: Blueprint, model: ClipModel, subset: tuple[str, ...], theta: int | None, missing: str = ""
) -> tuple[FusionModel, dict[str, Tensor]]:
    """Return the fusion model for some modalities alone, and one clip's tokens for it, on the meta device."""
    backbones = {m: model.backbones[m] for m in subset}
    tokens = {m: torch.empty(1, each.n_tokens, each.width, device="meta") for m, each in backbones.items()}
    tokens = {m: theta_average(values, theta) if theta else values for m, values in tokens.items()}
    widths = {m: values.shape[2] for m, values in tokens.items()}
    n_tokens = {m: values.shape[1] for m, values in tokens.items()}
    with torch.device("meta"):
        return build_fusion(widths, n_tokens, blueprint.n_classes, blueprint.config, missing), tokens


def _operations(module: nn.Module, *inputs: Any) -> int:
    """Return the operations of one pass; attention is taken apart into its two products, so that both are seen."""
    module.eval().requires_grad_(False)  # the counter would look for the gradients of parameters that are passed on
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def _n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
