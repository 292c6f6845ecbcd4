"""Weights files: tensors by name, read without running any code that is in the file."""

import struct
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # how torch.load(weights_only=True) says no; nothing is unpickled here
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# What torch's reading of a damaged file ends in.
DAMAGED = (
    UnpicklingError, OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OverflowError, struct.error,
)  # fmt: skip


def read_tensors(path: Path) -> "Mapping[str, Tensor]":
    """Return the tensors of a .safetensors file, or of a state dict saved by torch, on the CPU.

    A checkpoint that holds its state dict under the name `state_dict` or `model`, beside other things, will do.

    Raises ConfigError if the file is missing, damaged, hostile, or holds anything else.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ConfigError(f"{path}: no such weights file. Correct the path, or set weights to none.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, *DAMAGED) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{path}: not a readable weights file: {reason}. Save it again as .safetensors.") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    tensors = isinstance(state, Mapping) and all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    if not tensors or not state:
        raise ConfigError(
            f"{path}: expected tensors by name, found something else. Save a state dict and nothing around it."
        )
    return state
