"""How fast to learn at which step, and which parameters to decay."""

import math
from typing import Any

from torch import nn

from ..data.errors import ConfigError


def learning_rate(
    step: int,
    steps_per_epoch: int,
    *,
    max_lr: float,
    min_lr: float = 1e-5,
    warmup_epochs: float = 10,
    epochs: int = 100,
) -> float:
    """Return the learning rate of optimizer step `step` (0 is the first).

    Linear from min_lr to max_lr over the warm-up, then half a cosine that is back at min_lr at the last step, and
    min_lr after it. A warm-up that would leave no step to come down is cut to half of the run.
    Raises ConfigError if max_lr < min_lr.  Source: KARMMA sec. 4 (10 of 100 epochs).
    """
    if max_lr < min_lr:
        raise ConfigError(f"Learning rate: maximum {max_lr} is below minimum {min_lr}. Raise one or lower the other.")
    last = epochs * steps_per_epoch - 1
    warmup = warmup_epochs * steps_per_epoch
    if warmup >= last:
        warmup = (last + 1) // 2
    if step < warmup:
        return min_lr + (max_lr - min_lr) * step / warmup
    share = (step - warmup) / (last - warmup) if step < last else 1.0
    return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * share)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters as two groups for an optimizer: with `weight_decay`, and without.

    Decayed are the matrices and kernels that multiply tokens. Biases and norms have few values, whose size is no
    measure of complexity; learned tokens, CLS, position tables and embeddings are inputs rather than weights, and a
    stand-in for a missing modality that is seldom used would only shrink. The paper does not say; this is the habit of
    ViT and Swin. Frozen parameters are in neither group.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            multiplies = name.endswith("weight") and parameter.ndim >= 2 and id(parameter) not in tables
            groups[multiplies].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
