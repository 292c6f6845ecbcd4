"""Activation checkpointing: a backbone's blocks keep their inputs alone, and are run again in the backward pass."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(backbone: nn.Module) -> None:
    """Let every block of a backbone run again in the backward pass rather than keep what it computed.

    A block is what stands in a list or sequence and has parts of its own, such as a transformer layer.
    """
    lists = (nn.Sequential, nn.ModuleList)
    for parent in list(backbone.modules()):
        blocks = parent.children() if isinstance(parent, lists) else ()
        for block in blocks:
            if not isinstance(block, lists) and next(block.children(), None) is not None:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
