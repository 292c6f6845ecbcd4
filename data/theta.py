"""Theta-Average: fewer tokens without parameters; it acts on a backbone's output, before the cache."""

import torch
from torch import Tensor

from .errors import ConfigError


def theta_average(tokens: Tensor, theta: int, balanced: bool = False) -> Tensor:
    """Average neighbouring tokens until at most `theta` remain.

    tokens: [B, K, D], in the backbone's own order. Returns [B, min(K, theta), D], same dtype (sums are kept in at least
    float32); K <= theta comes back unchanged. Each group takes floor(K / theta) tokens and the last one also all that
    is left over: 785 tokens at theta 300 are 299 pairs and one group of 187. With `balanced` the sizes differ by one
    at most, the larger groups first.
    Raises ConfigError if theta < 1, ValueError if tokens are not [B, K, D].  Source: KARMMA sec. 3.5.
    """
    if theta < 1:
        raise ConfigError(f"Theta-Average: theta is {theta}, expected at least 1. Set theta to 1 or more.")
    if tokens.ndim != 3:
        raise ValueError(f"Theta-Average: tokens have shape {tuple(tokens.shape)}, expected [B, K, D].")
    n_clips, n_tokens, width = tokens.shape
    if n_tokens <= theta:
        return tokens
    size, left = divmod(n_tokens, theta)
    # Either way the groups are two runs of equal ones: (how many groups, tokens in each).
    runs = ((left, size + 1), (theta - left, size)) if balanced else ((theta - 1, size), (1, size + left))
    dtype = torch.promote_types(tokens.dtype, torch.float32)  # a float16 sum of 187 tokens may overflow
    averages, start = [], 0
    for n_groups, size in runs:
        stop = start + n_groups * size
        groups = tokens[:, start:stop].reshape(n_clips, n_groups, size, width)
        averages.append(groups.mean(dim=2, dtype=dtype))  # [B, n_groups, D]
        start = stop
    return torch.cat(averages, dim=1).to(tokens.dtype)  # [B, theta, D]
