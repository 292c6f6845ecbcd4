"""A frozen backbone at work: raw arrays of a batch in, Theta-averaged tokens out, in float32 or bfloat16."""

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..data.cache import Cache
from ..data.config import DataConfig
from ..data.device import arithmetic, enough_memory
from ..data.errors import KarmmaError
from ..data.theta import theta_average
from .backbones import Backbone, build_backbone
from .config import ExtractConfig
from .weights import backbone_request, record_backbone, recorded_backbone

# Clips of the first batch that bfloat16 is held against float32 on, and the cosine below which it is refused.
N_CHECKED = 4
LEAST_COSINE = 0.99


@lru_cache(maxsize=4)  # the first extraction asks twice: for the digest, then for the tokens
def build_frozen(modality: str, data: DataConfig, config: ExtractConfig) -> Backbone:
    """Return a modality's backbone in evaluation mode, without gradients, in float32 on the CPU."""
    chosen = getattr(config, modality)
    shape = data.input_shape(modality)
    backbone = build_backbone(chosen.name, modality, shape, chosen.weights, config.seed, chosen.clip_token)
    return backbone.eval().requires_grad_(False)


def record_backbones(
    cache: Cache, modalities: list[str], data: DataConfig, config: ExtractConfig
) -> dict[str, dict[str, Any]]:
    """Build backbones met for the first time and record what they are; return the records by modality."""
    records = {}
    for modality in modalities:
        request = backbone_request(modality, data, config)
        name = getattr(config, modality).name
        record_backbone(cache, request, name, build_frozen(modality, data, config))
        recorded = recorded_backbone(cache, request)
        assert recorded is not None  # just now
        records[modality] = recorded
    return records


class FrozenBackbone:
    """A backbone on its device in the precision asked for.

    agreement: what the first batch said of bfloat16: clips, and the mean and least cosine of their tokens to those of
    float32; None before it, and in float32.
    """

    def __init__(self, modality: str, backbone: Backbone, config: ExtractConfig, device: torch.device) -> None:
        self.modality, self.config, self.device = modality, config, device
        self.agreement: dict[str, float] | None = None
        self._exact: Backbone | None = None
        self.backbone = backbone.to(device)
        if config.precision == "bfloat16":
            self._exact = self.backbone
            if device.type != "cuda":  # autocast would convert the weights anew in every batch
                self.backbone = copy.deepcopy(self.backbone).bfloat16()

    def tokens(self, arrays: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return place -> tokens [k, D] float32 of the clips at some places of one batch.

        The batch always has its full size, empty places hold zeros that nobody looks at: what comes out for a clip
        does not depend on which of its neighbours are there, to the last bit.  Raises MemoryShortError.
        """
        if not arrays:
            return {}
        first = next(iter(arrays.values()))
        is_cuda = self.device.type == "cuda"
        shape = (self.config.batch_size, *first.shape)
        advice = f"Lower --batch-size ({self.config.batch_size}) or --readers."
        with enough_memory(f"the backbone of {self.modality} on {self.device}", advice), torch.inference_mode():
            batch = torch.zeros(shape, dtype=_dtype(first), device="cpu", pin_memory=is_cuda)
            for place, array in arrays.items():
                batch[place] = torch.from_numpy(array)
            on_device = batch.to(self.device, non_blocking=is_cuda)
            with arithmetic(self.config.precision if is_cuda else "float32", self.device):
                found = self._averaged(self.backbone, on_device)
            if self._exact is not None:
                self._compare(self._exact, found, on_device, sorted(arrays)[:N_CHECKED])
            values = found.cpu().numpy()
        return {place: values[place] for place in arrays}

    def _averaged(self, backbone: Backbone, batch: Tensor) -> Tensor:
        tokens = backbone(batch).float()
        return theta_average(tokens, self.config.theta) if self.config.theta else tokens

    def _compare(self, backbone: Backbone, found: Tensor, batch: Tensor, places: list[int]) -> None:
        """Hold bfloat16 against float32 on a few clips, once; raise KarmmaError if they are not nearly the same."""
        exact = self._averaged(backbone, batch[places])
        cosine = cosine_similarity(found[places], exact, dim=-1)  # [n, k]
        fit = exact.isfinite().flatten(1).all(dim=1)  # the others are refused, each by its name
        n_fit = int(fit.sum().item())
        if not n_fit:
            return
        mean, least = torch.where(fit, cosine.mean(1), 0).sum() / n_fit, torch.where(fit, cosine.amin(1), 1).min()
        self.agreement = {"clips": n_fit, "mean": mean.item(), "least": least.item()}
        if not self.agreement["mean"] >= LEAST_COSINE:
            raise KarmmaError(
                f"{self.modality}: in bfloat16 the tokens of {n_fit} clips have a mean cosine of "
                f"{self.agreement['mean']:.4f} to those in float32, expected {LEAST_COSINE} or more. "
                "Extract with --precision float32."
            )
        self._exact = None  # its memory is needed


def _dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(array[:0]).dtype
