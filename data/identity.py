"""What made a store: the fields of its identity, and the refusal to mix two of them."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .config import DataConfig
from .flow_methods import flow_identity
from .modality import is_own

if TYPE_CHECKING:
    from torch import Tensor

# Raised by hand whenever our own reading, cropping, flow or spectrogram code changes what a model sees.
PREPROCESSING = 4
FORMAT = 1


def major(package: str) -> str:
    """Return name and major version of an installed package, without importing it."""
    return f"{package} {version(package).split('.')[0]}"


def input_identity(modality: str, data: DataConfig) -> dict[str, Any]:
    """Return everything that decides what a model sees of a clip's `modality`, apart from the clip itself.

    Nothing for a modality of one's own: what imported features were made from is known to whoever imported them.
    """
    if is_own(modality):
        return {}
    decoders = {"flow": ["av", "opencv-python-headless"], "detections": []}.get(modality, ["av"])
    settings = data.input_settings(modality)
    method = flow_identity(data) if modality == "flow" else {}
    return {"preprocessing": PREPROCESSING, "decoder": [major(name) for name in decoders], **settings, **method}


def token_identity(
    modality: str, data: DataConfig, backbone: Mapping[str, Any], theta: int | None, precision: str
) -> dict[str, Any]:
    """Return the identity of a token store; its digest names the store.

    backbone: name, weights digest, and options.  Paths, labels, the clip table and the number of views are no part
    of it: the same tokens may be reached by another path.  Source: design.md section 4.
    """
    return {
        "format": FORMAT,
        "modality": modality,
        "backbone": dict(backbone),
        "precision": precision,
        "input": input_identity(modality, data),
        "theta": theta,
        "dtype": "float16",
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name every field in which two identities differ, as 'input.frames is 8, asked for 16'."""
    said = []
    for key in sorted({*found, *wanted}):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            said += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            said.append(f"{prefix}{key} is {old!r}, asked for {new!r}")
    return said


def tensors_digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return 16 hex digits over names, dtypes, shapes and bytes of a state dict, whatever its order."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # As bytes: NumPy has no bfloat16.
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]
