"""InfoNCE over the batch of all ranks: real processes over gloo against one process with the whole batch."""

import pytest
import torch
from karmma.fuse.losses import info_nce
from karmma.fuse.ranks import over_ranks
from torch import distributed as dist
from torch import multiprocessing

NAMES = ("video", "audio", "flow")


def whole_batch():
    """Seven clips of which some lack modalities; none of the first three has audio."""
    shape = (7, 4)
    tokens = {m: (torch.arange(28) * (0.3 + 0.2 * at)).sin().view(shape) for at, m in enumerate(NAMES)}
    present = torch.ones(7, 3, dtype=torch.bool)
    present[:3, 1] = False
    present[5, 0] = False
    return tokens, present


def loss_of(weight, rows):
    """InfoNCE of some of the clips, whose tokens pass a layer of one weight matrix."""
    tokens, present = whole_batch()
    return info_nce({m: values[rows] @ weight for m, values in tokens.items()}, 0.1, present[rows])


def wanted():
    weight = torch.eye(4).requires_grad_()
    loss = loss_of(weight, slice(None))
    loss.backward()
    return loss.detach(), weight.grad


def on_rank(rank, store, cuts, folder):
    """Train one step as DistributedDataParallel does: gradients are averaged over the ranks."""
    n_ranks = len(cuts) - 1
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n_ranks)
    weight = torch.eye(4).requires_grad_()
    loss = loss_of(weight, slice(cuts[rank], cuts[rank + 1]))
    loss.backward()
    dist.all_reduce(weight.grad)
    torch.save((loss.detach(), weight.grad / n_ranks), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# A rank without any audio, and one without any clip.
@pytest.mark.parametrize("cuts", [(0, 3, 7), (0, 0, 7)], ids=str)
def test_info_nce_over_two_ranks_is_that_of_the_whole_batch_with_its_gradient(cuts, tmp_path):
    multiprocessing.spawn(on_rank, (tmp_path / "store", cuts, tmp_path), nprocs=2)
    loss, gradient = wanted()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found[0], loss)
        torch.testing.assert_close(found[1], gradient, rtol=1e-4, atol=1e-6)


def test_rows_of_one_process_come_back_as_they_are():
    rows = torch.ones(2, 3)
    assert over_ranks(rows) is rows
