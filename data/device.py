"""Which device a model runs on, decided once and passed on explicitly."""

import torch


def choose_device(name: str) -> torch.device:
    """Return the torch device of a setting; 'auto' takes CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
