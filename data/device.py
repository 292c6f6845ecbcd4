"""Which device a model runs on, decided once and passed on explicitly."""

import torch

from .errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the torch device of a setting; 'auto' takes CUDA where there is one.

    Raises ConfigError if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"device = {name!r}: {reason}. Use auto or cpu.") from None
    return torch.device(name)
