"""Training on several ranks: each has a part of every batch, and all of them take the step of the whole one."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the ranks that `torchrun` started, if it did; yield this rank's device and leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def n_ranks() -> int:
    """Return how many ranks train; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Say whether this rank is the one that writes."""
    return n_ranks() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Wait until all ranks are here."""
    if n_ranks() > 1:
        dist.barrier()


def own_part(rows: np.ndarray) -> np.ndarray:
    """Return this rank's part of the rows [n], which all ranks together cover once; it may be empty."""
    return rows if n_ranks() == 1 else np.array_split(rows, n_ranks())[dist.get_rank()]


def summed(values: Tensor) -> Tensor:
    """Return the sum over all ranks, without a gradient."""
    if n_ranks() > 1:
        values = values.detach().clone()
        dist.all_reduce(values)
    return values


def over_ranks(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, [sum of B, ...] in the order of ranks, from this rank's [B, ...].

    B may differ from rank to rank, and be 0. The gradient reaches this rank's own rows, times the number of ranks:
    averaged over the ranks, as `average_gradients` does, it is then that of the loss over the whole batch.
    Without a process group the rows come back as they are.  All ranks have to call it, in the same order.
    """
    if n_ranks() == 1:
        return rows
    rank = dist.get_rank()
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(n_ranks())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    padded = rows.new_zeros(int(torch.cat(counts).max()), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    sent = padded.to(torch.uint8) if rows.dtype == torch.bool else padded
    received = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(received, sent)
    found = [part[: int(n)].to(rows.dtype) for part, n in zip(received, counts, strict=True)]
    if rows.requires_grad:
        found[rank] = rows + (n_ranks() - 1) * (rows - rows.detach())  # the same values
    return torch.cat(found)


def merged(found: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """Return what all ranks have found, as one."""
    line = torch.frombuffer(bytearray((json.dumps(found) + "\n").encode()), dtype=torch.uint8)
    lines = over_ranks(line.to(device)).cpu().numpy().tobytes().decode().splitlines()
    return {name: value for each in lines for name, value in json.loads(each).items()}


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the ranks; a parameter that no rank used keeps none.

    Not left to DistributedDataParallel: a rank may lack a modality in its whole part of the batch, and then uses other
    parameters than its neighbours.
    """
    if n_ranks() == 1:
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_used = [parameter.grad is not None for parameter in parameters]
    n_users = summed(torch.tensor(is_used, dtype=torch.int32, device=parameters[0].device)).tolist()
    shared = [parameter for parameter, n in zip(parameters, n_users, strict=True) if n]
    if not shared:  # a batch whose clips all failed
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in shared])
    dist.all_reduce(flat)
    flat /= n_ranks()
    for parameter, mean in zip(shared, flat.split([parameter.numel() for parameter in shared]), strict=True):
        parameter.grad = mean.view_as(parameter).clone()
