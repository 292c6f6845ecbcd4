"""Which device a model runs on, decided once and passed on explicitly."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .errors import ConfigError, MemoryShortError, is_memory_short, memory_short


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


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turn running out of memory, of the machine or of a GPU, into a MemoryShortError that ends in `advice`."""
    try:
        yield
    except MemoryShortError:  # said already
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_memory_short(error):
            raise
        raise memory_short(error, f" for {what}", advice) from None


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a forward pass computes in `precision`: autocast for bfloat16, nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def has_bfloat16(device: torch.device) -> bool:
    """Say whether the device computes in bfloat16 itself; elsewhere it goes by way of float32, several times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
