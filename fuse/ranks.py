"""Training on several ranks: what a loss over the whole batch needs from the others."""

import torch
from torch import Tensor
from torch import distributed as dist


def over_ranks(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, [sum of B, ...] in the order of ranks, from this rank's [B, ...].

    B may differ from rank to rank, and be 0. The gradient reaches this rank's own rows, times the number of ranks:
    averaged over the ranks, as DistributedDataParallel does, it is then that of the loss over the whole batch.
    Without a process group the rows come back as they are.  All ranks have to call it, in the same order.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    n_ranks, rank = dist.get_world_size(), dist.get_rank()
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(n_ranks)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = int(torch.cat(counts).max())
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    sent = padded.to(torch.uint8) if rows.dtype == torch.bool else padded
    received = [torch.empty_like(sent) for _ in range(n_ranks)]
    dist.all_gather(received, sent)
    found = [part[: int(n)].to(rows.dtype) for part, n in zip(received, counts, strict=True)]
    if rows.requires_grad:
        found[rank] = rows + (n_ranks - 1) * (rows - rows.detach())  # the same values
    return torch.cat(found)
