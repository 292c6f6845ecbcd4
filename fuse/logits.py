"""Run the trained teacher over every cached clip and view, and store its logits by (clip, view)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.batches import TokenBatch, TokenReader
from ..data.modality import ABSENT, PRESENT, UNWRITTEN
from ..data.stores import LogitStore
from .model import FusionModel


@torch.inference_mode()
def run_teacher(
    model: FusionModel, reader: TokenReader, rows: np.ndarray, view: int, device: torch.device, batch_size: int = 64
) -> Iterator[tuple[TokenBatch, dict[str, torch.Tensor]]]:
    """Yield (batch, logits by head on the CPU) over table rows; clips without any modality must not be among them."""
    model.eval()
    plan = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for batch in reader.batches(plan, view):
        tokens = {modality: values.to(device, non_blocking=True).float() for modality, values in batch.tokens.items()}
        output = model(tokens, batch.present.to(device))
        yield batch, {head: logits.float().cpu() for head, logits in output.logits.items()}


def write_logits(
    model: FusionModel,
    reader: TokenReader,
    path: Path,
    attributes: dict[str, Any],
    *,
    made_from: np.ndarray,
    n_views: int,
    device: torch.device,
) -> LogitStore:
    """Fill the logit store of a teacher for every clip of the table.

    made_from: [rows of the cache] digest of each clip's sources and times, '' for clips that are not in the table.
    A clip in which every modality is missing is `absent` there: no logits.
    """
    classes, shape = attributes["classes"], (len(made_from), n_views)
    logits = {head: np.full((*shape, len(names)), np.nan, np.float32) for head, names in classes.items()}
    state = np.full(shape, UNWRITTEN, np.uint8)
    every = np.arange(len(reader.cache_rows))
    for view in range(shape[1]):
        rows = every[reader.written(every, view)]
        usable = reader.present(rows, view).any(axis=1)
        state[reader.cache_rows[rows], view] = np.where(usable, PRESENT, ABSENT)
        for batch, found in run_teacher(model, reader, rows[usable], view, device):
            for head, values in found.items():
                logits[head][reader.cache_rows[batch.rows], view] = values.numpy()
    return LogitStore.write(path, logits, state, made_from, attributes)
