"""Run a finished student or teacher over a split, under every subset of its modalities."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..data.annotations import ClipTable
from ..data.batches import TokenReader
from ..data.cache import Cache, table_digests
from ..data.config import Place, digest
from ..data.device import choose_device
from ..data.errors import IncompleteCacheError, MediaError, RunError, TableError
from ..data.modality import subsets
from ..data.progress import watched
from ..data.runs import RunFolder
from ..data.selection import n_missing
from ..data.stores import TokenStore
from ..data.verify import FirstSight
from ..fuse.logits import load_teacher
from .results import Asked
from .stream import ClipStream
from .student import load_student
from .subsets import Predictions, averaged_over, mended, subset_logits, teacher_logits
from .variants import run_modalities


def predict_run(run: RunFolder, table: ClipTable, cache: Place, asked: Asked, path: Path) -> Predictions:
    """Return logits of every clip of a split, labelled or not, under every subset of the run's modalities.

    What is saved at `path` is read if it is of this run and of these clips, else computed and saved.
    A modality that cannot be read counts as missing and its clip is named; a clip with nothing left is left out.
    cache: where a teacher's tokens are.  Raises TableError if the split is empty, MediaError if no clip can be read,
    IncompleteCacheError if a teacher's tokens are not there.
    """
    kind = run.config.get("kind") if isinstance(run.config, dict) else None
    if kind not in ("student", "teacher"):
        raise RunError(f"{run.path}: the run of a {kind}, expected a student's or teacher's. Name another run.")
    rows = table.rows(asked.split)
    if not len(rows):
        raise TableError(f"{table.path}: no clip in split {asked.split!r}. Choose another with --split.")
    clips = [table.clip_ids[rows].tolist(), table_digests(table)[rows].tolist()]
    made_from = digest([run.config, run.result, clips, asked.views])
    saved = Predictions.load(path, table.clip_ids, subsets(modalities_of(run)), made_from)
    if saved is not None and not saved.failed:
        return saved
    due = rows if saved is None else np.flatnonzero(np.isin(table.clip_ids, list(saved.failed)))
    with watched("evaluate", asked.views * len(due), "clips") as progress:
        predict = _by_student if kind == "student" else _by_teacher
        found = averaged_over(predict(run, table, cache, asked, due, progress.advance))
    if saved is not None:  # what failed before was looked at once more
        found = mended(saved, found, due)
    if not len(found.rows):
        clip_id, reason = next(iter(found.failed.items()))
        raise MediaError(f"No clip of {asked.split!r} can be read, such as {clip_id}: {reason.rstrip('.')}. Mend it.")
    found.save(path, table.clip_ids[found.rows], made_from)
    return found


def modalities_of(run: RunFolder) -> tuple[str, ...]:
    """Return the modalities of a student's or teacher's run, in order; raises RunError if it does not say them."""
    try:
        return run_modalities(run.config)
    except KeyError as error:
        raise RunError(f"{run.path}: config.json says nothing of {error.args[0]!r}. Train the run again.") from None


def _by_student(
    run: RunFolder, table: ClipTable, _: Place, asked: Asked, rows: np.ndarray, count: Callable[[int], None]
) -> list[Predictions]:
    device = choose_device(asked.device)
    student, data = load_student(run, device, asked.flow_weights)[:2]
    chosen = subsets(student.modalities)
    with ClipStream(table, data, student.modalities, readers=asked.readers, allow_failures=len(rows)) as stream:
        return [subset_logits(student, stream, rows, chosen, device, count, view) for view in range(asked.views)]


def _by_teacher(
    run: RunFolder, table: ClipTable, cache_place: Place, asked: Asked, rows: np.ndarray, count: Callable[[int], None]
) -> list[Predictions]:
    device, cache = choose_device(asked.device), Cache.open(cache_place)
    names = run.config["tokens"]
    stores = {modality: TokenStore.open(cache.tokens_path(modality, name)) for modality, name in names.items()}
    pin = device.type == "cuda"
    reader = TokenReader(stores, cache.rows(table.clip_ids), pin, FirstSight(cache, stores))
    model, found = load_teacher(run, stores).to(device), []
    failed: dict[str, str] = {}
    for modality, name in names.items():
        for clip_id, reason in cache.failures(modality, name, table.clip_ids[rows]).items():
            failed[clip_id] = "; ".join(filter(None, (failed.get(clip_id), f"{modality} failed: {reason}")))
    for view in range(asked.views):
        for modality, name in names.items():
            _require_tokens(cache, table, modality, name, view, asked.split)
        found.append(teacher_logits(model, reader, rows, subsets(names), device, count, view))
    return [each.with_failures(failed, table.clip_ids) for each in found]


def _require_tokens(cache: Cache, table: ClipTable, modality: str, name: str, view: int, split: str) -> None:
    """Raise IncompleteCacheError unless every clip of the split has tokens in a view, as the table has it now."""
    due = table.split == split
    n = n_missing(cache, table, modality, name, view, due)
    if n:
        raise IncompleteCacheError(
            f"{cache.tokens_path(modality, name)}: {n} of {due.sum()} clips of split {split!r} have no "
            f"{modality} tokens of view {view}. Run karmma extract, or evaluate fewer views."
        )
