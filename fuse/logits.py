"""Run the trained teacher over every cached clip and view, and store its logits by (clip, view)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from ..data.batches import TokenBatch, TokenReader
from ..data.cache import Cache
from ..data.errors import RunError, one_line
from ..data.modality import ABSENT, PRESENT, UNWRITTEN
from ..data.runs import RunFolder
from ..data.stores import LogitStore, TokenStore
from ..data.theta import theta_average
from .config import TeacherConfig
from .model import FusionModel, build_fusion
from .ranks import is_first, over_ranks, own_part

BATCH_SIZE = 64  # clips at a time where nothing is learned


def on_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """Return the batch with its tokens on the device, as they are in the cache."""
    tokens = {modality: values.to(device, non_blocking=True) for modality, values in batch.tokens.items()}
    return TokenBatch(batch.rows, tokens, batch.present.to(device))


def averaged(batch: TokenBatch, model: FusionModel) -> dict[str, Tensor]:
    """Return a batch's tokens in float32, averaged to as many as the model takes."""
    n_tokens = model.embedding.n_tokens
    return {modality: theta_average(values.float(), n_tokens[modality]) for modality, values in batch.tokens.items()}


def cached_batches(reader: TokenReader, rows: np.ndarray, view: int, device: torch.device) -> Iterator[TokenBatch]:
    """Yield the cached tokens of table rows on a device, as many clips at a time as fit where nothing is learned."""
    plan = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    for batch in reader.batches(plan, view):
        yield on_device(batch, device)


@torch.inference_mode()
def run_teachers(
    models: Sequence[FusionModel], reader: TokenReader, rows: np.ndarray, view: int, device: torch.device
) -> Iterator[tuple[np.ndarray, list[dict[str, Tensor]]]]:
    """Yield (rows [B], logits by head on the CPU, of each model), each batch of table rows read once.

    Clips without any modality must not be among the rows.
    """
    for model in models:
        model.eval()
    for there in cached_batches(reader, rows, view, device):
        outputs = [model(averaged(there, model), there.present) for model in models]
        yield there.rows, [{head: logits.float().cpu() for head, logits in out.logits.items()} for out in outputs]


def shared_logits(
    models: Sequence[FusionModel], reader: TokenReader, rows: np.ndarray, view: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Return each model's logits head -> [n, N_h] of table rows, on the CPU; every rank computes a part of them."""
    found = [logits for _, logits in run_teachers(models, reader, own_part(rows), view, device)]
    out = []
    for at, model in enumerate(models):
        own = joined_logits(model, [logits[at] for logits in found])
        out.append({head: over_ranks(part.to(device)).cpu() for head, part in own.items()})
    return out


def joined_logits(model: FusionModel, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return head -> [n, N_h] of all parts, one after the other, on the CPU; there may be none."""
    sizes = model.n_classes.items()
    return {head: torch.cat([torch.empty(0, size), *(part[head] for part in parts)]) for head, size in sizes}


def write_logits(
    model: FusionModel,
    reader: TokenReader,
    path: Path,
    attributes: dict[str, Any],
    *,
    made_from: np.ndarray,
    n_views: int,
    device: torch.device,
) -> None:
    """Fill the logit store of a teacher for every clip of the table; each rank computes a part, the first one writes.

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
        (found,) = shared_logits([model], reader, rows[usable], view, device)
        for head, values in found.items():
            logits[head][reader.cache_rows[rows[usable]], view] = values.numpy()
    if is_first():
        LogitStore.write(path, logits, state, made_from, attributes)


@dataclass(frozen=True)
class Recomputed:
    """What became of a sample of a teacher's logits: how many clips, the largest difference, or why there is none."""

    teacher: str
    n_clips: int = 0
    error: float = 0.0
    reason: str = ""


def recompute(cache: Cache, runs: Path, n_clips: int) -> Iterator[Recomputed]:
    """Compute some logits of every teacher in the cache again, from its tokens, in each view.

    runs: where the teachers' runs are.  n_clips: spread over those that have logits.
    """
    for path in sorted((cache.path / "logits").glob("*.zarr")):
        store = LogitStore.open(path)
        run = RunFolder(runs / store.attributes["run"])
        tokens = {m: cache.tokens_path(m, name) for m, name in store.attributes["tokens"].items()}
        if not tokens or not run.is_finished:
            said = f"its run {run.path} is not there" if tokens else "it was imported"
            yield Recomputed(path.stem, reason=said)
            continue
        stores = {modality: TokenStore.open(place) for modality, place in tokens.items()}
        reader, model = TokenReader(stores, np.arange(cache.n_clips)), load_teacher(run, stores)
        checked, error = 0, 0.0
        for view in range(store.n_views):
            (there,) = np.nonzero(store.has(np.arange(store.n_clips), view))
            rows = there[np.unique(np.linspace(0, len(there) - 1, min(n_clips, len(there))).round().astype(int))]
            for some, (found,) in run_teachers([model], reader, rows, view, torch.device("cpu")):
                wanted = store.read(some, view)
                off = [np.abs(values.numpy() - wanted[head]).max() for head, values in found.items()]
                checked, error = checked + len(some), float(np.max([error, *off]))  # NaN, if there is one
        yield Recomputed(path.stem, checked, error)


def build_teacher(stores: Mapping[str, TokenStore], n_classes: Mapping[str, int], config: TeacherConfig) -> FusionModel:
    """Build the fusion model for the tokens of some stores."""
    widths = {modality: store.width for modality, store in stores.items()}
    n_tokens = {modality: min(store.k, config.theta or store.k) for modality, store in stores.items()}
    return build_fusion(widths, n_tokens, n_classes, config)


def load_teacher(run: RunFolder, stores: dict[str, TokenStore]) -> FusionModel:
    """Return the best fusion model of a finished run, in evaluation mode; stores: those that it was trained on.

    Raises RunError if config.json is not that of a teacher of this version, or the checkpoint not that of the two.
    """
    described, weights = run.config, run.load_checkpoint("best")
    try:
        config = TeacherConfig.model_validate(described["settings"])
        model = build_teacher(stores, {head: len(names) for head, names in described["classes"].items()}, config)
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, ValidationError) as error:
        raise RunError(
            f"{run.path}: its config.json, its weights and these tokens do not belong together: "
            f"{one_line(error)[:200]}. Train the teacher again."
        ) from None
    return model.eval()
