"""Which tensors a backbone will have, known without building it a second time.

The identity of a cache needs a digest over the backbone's tensors.  The first extraction builds the backbone and
records the digest under everything that decides those tensors; later runs look it up and need no torch.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.cache import Cache
from ..data.config import DataConfig, digest
from ..data.errors import ConfigError
from ..data.publish import publish_json, read_json
from .config import BackboneConfig, ExtractConfig

NAMED_WEIGHTS = ("none", "kinetics400")


def backbone_request(modality: str, data: DataConfig, config: ExtractConfig) -> dict[str, Any]:
    """Return all that decides a backbone's tensors: name, input shape, and the weights by content."""
    chosen: BackboneConfig = getattr(config, modality)
    request = {"name": chosen.name, "modality": modality, "input_shape": list(data.input_shape(modality))}
    libraries = {name: version(name) for name in ("torch", "torchvision", "timm")}
    if chosen.weights == "none":
        return {**request, "weights": f"none, seed {config.seed}", "libraries": libraries}
    if chosen.weights in NAMED_WEIGHTS:
        return {**request, "weights": chosen.weights, "libraries": libraries}
    path = Path(chosen.weights)
    if not path.is_file():
        raise ConfigError(
            f"extract.{modality}.weights = {chosen.weights!r}: no such file, and not one of "
            f"{', '.join(NAMED_WEIGHTS)}. Name a local file, or ask for random weights with "
            f"--set extract.{modality}.weights=none."
        )
    with open(path, "rb") as file:
        return {**request, "weights": hashlib.file_digest(file, "sha256").hexdigest(), "libraries": libraries}


def _record(cache: Cache, request: dict[str, Any]) -> Path:
    return cache.path / "receipts" / "backbones" / f"{digest(request)}.json"


def recorded_backbone(cache: Cache, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the part of an identity that a request's backbone stands for, or None if it was never built here."""
    path = _record(cache, request)
    return read_json(path)["backbone"] if path.exists() else None


def record_backbone(cache: Cache, request: dict[str, Any], backbone: dict[str, Any]) -> None:
    """Record what a request's backbone turned out to be: its name and the digest of its weights."""
    publish_json(_record(cache, request), {"request": request, "backbone": backbone})
