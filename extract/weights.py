"""Which tensors a backbone will have, known without building it a second time.

The identity of a cache needs a digest over the backbone's tensors.  The first extraction builds the backbone and
records the digest under everything that decides those tensors; later runs look it up and need no torch.
"""

import hashlib
from importlib.metadata import EntryPoints, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.cache import Cache
from ..data.config import DataConfig, digest
from ..data.errors import CacheError, ConfigError, InstallationError
from ..data.identity import differences, tensors_digest, token_identity
from ..data.publish import publish_json, read_json
from .config import BackboneConfig, ExtractConfig

if TYPE_CHECKING:
    from .backbone import Backbone

NAMED_WEIGHTS = ("none", "kinetics400", "pretrained")
PLUGINS = "karmma.backbones"


def plugged_in() -> EntryPoints:
    """Return the backbones that other packages bring, as entry points of the group `karmma.backbones`."""
    return entry_points(group=PLUGINS)


def backbone_request(modality: str, data: DataConfig, config: ExtractConfig) -> dict[str, Any]:
    """Return all that decides a backbone's tensors: name, input shape, and the weights by content."""
    chosen: BackboneConfig = getattr(config, modality)
    shape = list(data.input_shape(modality))
    request: dict[str, Any] = {"name": shown_name(chosen.name), "modality": modality, "input_shape": shape}
    try:
        request["libraries"] = {name: version(name) for name in _libraries(chosen.name)}
    except PackageNotFoundError as error:
        raise InstallationError(f"{chosen.name} needs {error.name}. Install it: pip install 'karmma[hf]'.") from None
    folder = hub_folder(chosen.name)
    if folder is not None:
        request["files"] = _files_digest(folder)
    if chosen.clip_token is not None:
        request["clip_token"] = chosen.clip_token
    if chosen.weights == "none":
        return {**request, "weights": f"none, seed {config.seed}"}
    return {**request, "weights": weights_content(chosen.weights, f"extract.{modality}")}


def weights_content(weights: str, where: str) -> str:
    """Return a name of weights as it is, and of a file the digest of its bytes: no path decides a result.

    where: names the backbone in errors, such as 'extract.video'.  Raises ConfigError if there is no such file.
    """
    if weights in NAMED_WEIGHTS:
        return weights
    path = Path(weights)
    if not path.is_file():
        raise ConfigError(
            f"{where}.weights = {weights!r}: no such file, and not one of "
            f"{', '.join(NAMED_WEIGHTS)}. Name a local file, or ask for random weights with "
            f"--set {where}.weights=none."
        )
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_folder(name: str) -> Path | None:
    """Return the folder of a backbone hf:<folder>, None for another name; raise ConfigError if it holds no model."""
    family, _, model = name.partition(":")
    if family != "hf" or not Path(model).is_dir():
        return None
    if not (Path(model) / "config.json").is_file():
        raise ConfigError(f"{name}: no config.json in this folder. Name one that save_pretrained wrote.")
    return Path(model)


def shown_name(name: str) -> str:
    """Return a backbone's name, for a folder the kind of model that it holds: no path belongs to an identity."""
    folder = hub_folder(name)
    return name if folder is None else f"hf:{read_json(folder / 'config.json').get('model_type')}"


def _libraries(name: str) -> list[str]:
    """Return the distributions whose versions decide what a name builds."""
    found = ["torch", "torchvision", "timm", *(["transformers"] if name.startswith("hf:") else [])]
    return [*found, *(point.dist.name for point in plugged_in() if point.name == name and point.dist)]


def _files_digest(folder: Path) -> str:
    """Return a digest over names and bytes of the model files of a folder."""
    found = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with open(file, "rb") as opened:
            found.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def _record(cache: Cache, request: dict[str, Any]) -> Path:
    return cache.path / "receipts" / "backbones" / f"{digest(request)}.json"


def recorded_backbone(cache: Cache, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a request's backbone turned out to be: its part of an identity as `backbone`, and the `shape` [K, D]
    of its tokens; None if it was never built here."""
    path = _record(cache, request)
    return read_json(path) if path.exists() else None


def record_backbone(cache: Cache, request: dict[str, Any], name: str, backbone: "Backbone") -> None:
    """Record what the backbone of a request turned out to be; `name` is the one in the settings."""
    found = {"backbone": backbone_identity(name, backbone), "shape": [backbone.n_tokens, backbone.width]}
    publish_json(_record(cache, request), {"request": request, **found})


def backbone_identity(name: str, backbone: "Backbone") -> dict[str, Any]:
    """Return a backbone's part of an identity: its name, never a path, and the digest of its weights.

    A class from another package has its version there too: what it computes may change where its tensors do not. So is
    a choice of the clip's token that is not the backbone's own.
    """
    code = [f"{point.dist.name} {point.dist.version}" for point in plugged_in() if point.name == name and point.dist]
    about: dict[str, Any] = {"name": shown_name(name), "weights": tensors_digest(backbone.state_dict())}
    if backbone.clip_token != type(backbone).clip_token:
        about["clip_token"] = backbone.clip_token
    return {**about, "code": code[0]} if code else about


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
            f"{'; '.join(differences(found, wanted))}. Use the cache's settings (--set extract.theta=... and so on), "
            "and the same versions and weights everywhere."
        )
