"""What the student learns from the teacher: its class probabilities, head by head."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.errors import ConfigError
from ..fuse.ranks import n_ranks, summed


def count_clips(rows: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Return how many clips the batch has over all ranks."""
    return summed(torch.tensor(len(rows), device=device))


def kl_divergence(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    temperature: float = 1.0,
    n_clips: Tensor | None = None,
) -> Tensor:
    """Return KL(teacher || student), mean over clips and heads, times temperature squared; float32 or better.

    student, teacher: head -> [B, N_h] logits. The student's heads count; no gradient reaches the teacher. Equal logits
    give 0, as do no clips. Where several ranks train, clips are counted over all of them, so that the mean of their
    losses is that of the whole batch.  n_clips: what `count_clips` says of a whole batch; these clips are then a part
    of it, and the losses of all parts add up to the whole one's.
    Raises ConfigError if temperature <= 0, ValueError if a head of the student has no equal in the teacher.
    Source: KARMMA eq. 4; the factor keeps the gradient's size when the temperature changes (Hinton et al., 2015).
    """
    if not temperature > 0:
        raise ConfigError(f"KL: temperature is {temperature}, expected a number above 0. Set it to the paper's 1.")
    parts = []
    for head, logits in student.items():
        shape = tuple(teacher[head].shape) if head in teacher else "none"
        if shape != tuple(logits.shape):
            raise ValueError(f"KL: teacher logits of {head!r} are {shape}, expected {tuple(logits.shape)}.")
        ours, theirs = (_log_probs(each, temperature) for each in (logits, teacher[head].detach()))
        parts.append(F.kl_div(ours, theirs, reduction="sum", log_target=True))
    if n_clips is None:
        n_clips = count_clips(logits, logits.device)
    return torch.stack(parts).mean() * temperature**2 * n_ranks() / n_clips.clamp(min=1)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities [B, N_h], in float32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits.to(dtype) / temperature, dim=1)
