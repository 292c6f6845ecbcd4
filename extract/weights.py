"""Which tensors a backbone will have, known without building it a second time.

The identity of a cache needs a digest over the backbone's tensors.  The first extraction builds the backbone and
records the digest under everything that decides those tensors; later runs look it up and need no torch.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.cache import Cache
from ..data.config import DataConfig, digest
from ..data.errors import CacheError, ConfigError
from ..data.identity import differences, tensors_digest, token_identity
from ..data.publish import publish_json, read_json
from .config import BackboneConfig, ExtractConfig

if TYPE_CHECKING:
    from .backbone import Backbone

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
    """Return what a request's backbone turned out to be: its part of an identity as `backbone`, and the `shape` [K, D]
    of its tokens; None if it was never built here."""
    path = _record(cache, request)
    return read_json(path) if path.exists() else None


def record_backbone(cache: Cache, request: dict[str, Any], backbone: "Backbone") -> None:
    """Record what a request's backbone turned out to be."""
    found = {"backbone": backbone_identity(request["name"], backbone), "shape": [backbone.n_tokens, backbone.width]}
    publish_json(_record(cache, request), {"request": request, **found})


def backbone_identity(name: str, backbone: "Backbone") -> dict[str, Any]:
    """Return a backbone's part of an identity: its name and the digest of its weights."""
    return {"name": name, "weights": tensors_digest(backbone.state_dict())}


def require_identity(
    cache: Cache, modality: str, store: str, backbone: "Backbone", data: DataConfig, config: ExtractConfig
) -> None:
    """Raise CacheError unless what is built and read in this process makes the tokens of the store of that digest.

    Another machine may have other weights under the same name, or another decoder.
    """
    identity = backbone_identity(getattr(config, modality).name, backbone)
    found = token_identity(modality, data, identity, config.theta, config.precision)
    if digest(found) != store:
        wanted = cache.identities(modality).get(store, {})
        raise CacheError(
            f"{cache.path}: this process would not make the {modality} tokens {store}: "
            f"{'; '.join(differences(found, wanted))}. Install the same versions and weights everywhere."
        )
