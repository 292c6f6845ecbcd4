"""The cached teacher held against a live one: raw clips, read as it saw them, through its backbones and its head."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.annotations import ClipTable
from ..data.batches import TokenBatch
from ..data.cache import Cache
from ..data.config import DataConfig
from ..data.device import choose_device
from ..data.errors import CacheError
from ..data.progress import watched
from ..data.runs import RunFolder
from ..data.stores import TokenStore
from ..extract.config import ExtractConfig
from ..extract.frozen import FrozenBackbone, build_frozen
from ..extract.weights import require_identity
from ..fuse.logits import averaged, load_teacher
from .config import StudentConfig
from .stream import ClipBatch, ClipStream
from .teacher import CachedTeacher, find_teacher

# Tokens are rounded to float16, and sums of other batches round some of them otherwise.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class LiveCheck:
    """How far a teacher's cached logits are from those it gives now, over n_clips (clip, view).

    error: largest difference.  largest: largest absolute logit.  n_agree: (clip, view, head) with the same first class,
    of n_answers.
    """

    teacher: str
    n_clips: int
    n_answers: int
    error: float
    largest: float
    n_agree: int

    @property
    def is_near(self) -> bool:
        """Say whether the difference is one of rounding; NaN is not."""
        return self.error <= TOLERANCE * max(1.0, self.largest)


class LiveTeacher:
    """A teacher's frozen backbones and fusion model, built anew.

    Raises CacheError if it was imported, if its run is not there, or if what is built here is not what made its tokens.
    """

    def __init__(
        self, cache: Cache, teacher: CachedTeacher, data: DataConfig, config: ExtractConfig, device: torch.device
    ) -> None:
        assert teacher.store is not None  # which `check_teacher` has seen to
        attributes, path = teacher.store.attributes, teacher.store.path
        run, names = RunFolder(data.runs / attributes["run"]), attributes["tokens"]
        foreign = [m for m, name in names.items() if "imported" in cache.identities(m)[name]["input"]]
        if not names or foreign:
            what = f"its {', '.join(foreign)} tokens were" if foreign else "it was"
            raise CacheError(
                f"{path}: {what} imported from elsewhere, so nothing here can compute it. Check another teacher, or "
                "cached tokens alone with karmma cache verify --logits."
            )
        if not run.is_finished:
            raise CacheError(f"{path}: its run {run.path} is not there. Name the folder of its runs with --runs.")
        stores = {modality: TokenStore.open(cache.tokens_path(modality, name)) for modality, name in names.items()}
        self.modalities, self.device, self.batch_size = tuple(names), device, config.batch_size
        self.fusion = load_teacher(run, stores).to(device)
        self.backbones = {}
        for modality, name in names.items():
            backbone = build_frozen(modality, data, config)
            require_identity(cache, modality, name, backbone, data, config)
            self.backbones[modality] = FrozenBackbone(modality, backbone, config, device)

    @torch.inference_mode()
    def logits(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return logits head -> [B, N_h] of raw clips, on the CPU; tokens are rounded as the cache rounds them."""
        tokens = {}
        for column, modality in enumerate(self.modalities):
            places = batch.present[:, column].nonzero()[:, 0].tolist()
            arrays = dict(zip(places, (batch.inputs[modality].numpy() if places else ()), strict=True))
            found = self.backbones[modality].tokens(arrays)
            if found:
                whole = torch.zeros(len(batch.rows), *next(iter(found.values())).shape, dtype=torch.float16)
                for place, values in found.items():
                    whole[place] = torch.from_numpy(values).half()
                tokens[modality] = whole.to(self.device)
        there = TokenBatch(batch.rows, tokens, batch.present.to(self.device))
        output = self.fusion(averaged(there, self.fusion), there.present)
        return {head: logits.float().cpu() for head, logits in output.logits.items()}


def check_teacher(
    table: ClipTable, data: DataConfig, extract: ExtractConfig, config: StudentConfig, n_clips: int
) -> LiveCheck:
    """Compare cached logits with a live teacher's on n_clips training clips, spread over table and views.

    Raises as `find_teacher` and `LiveTeacher`, and MediaError if a clip cannot be read.
    """
    cache = Cache.open(data.cache)
    teacher = find_teacher(cache, table, data, config)
    if teacher.store is None:
        raise CacheError(f"{cache.path}: there is no teacher to check, for the student has none. Leave out --teacher.")
    live = LiveTeacher(cache, teacher, data, extract, choose_device(config.device))
    errors, largest, n_agree, n_done = [0.0], 0.0, 0, 0
    for batch in _replayed(table, data, config, teacher, live, n_clips):
        if not len(batch.rows):
            continue
        found, cached = live.logits(batch), teacher.logits(batch.rows, batch.view)
        for head, now in found.items():
            before = torch.from_numpy(cached[head])
            errors.append((now - before).abs().max().item())
            largest = max(largest, before.abs().max().item())
            n_agree += int((now.argmax(1) == before.argmax(1)).sum())
        n_done += len(batch.rows)
    return LiveCheck(teacher.digest, n_done, n_done * len(data.heads), float(np.max(errors)), largest, n_agree)


def _replayed(
    table: ClipTable, data: DataConfig, config: StudentConfig, teacher: CachedTeacher, live: LiveTeacher, n_clips: int
) -> Iterator[ClipBatch]:
    """Read the chosen clips in every modality of the teacher, each in a view that it saw."""
    size = live.batch_size
    with (
        ClipStream(
            table, data, live.modalities, readers=config.readers, allow_failures=config.allow_failures
        ) as stream,
        watched("check teacher", n_clips, "clips") as progress,
    ):
        for view, rows in _chosen(teacher, n_clips):
            wanted = np.ones((len(rows), len(live.modalities)), bool)
            plan = [(rows[at : at + size], wanted[at : at + size]) for at in range(0, len(rows), size)]
            for batch in stream.batches(plan, view):
                yield batch
                progress.advance(len(batch.rows))


def _chosen(teacher: CachedTeacher, n_clips: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (view, table rows) of n_clips in all, or as many as there are, spread over those that have logits."""
    n_views = teacher.n_views
    for view in range(n_views):
        (there,) = np.nonzero(teacher.speaks(np.arange(len(teacher.cache_rows)), view))
        n = min(len(there), n_clips // n_views + (view < n_clips % n_views))
        if n:
            yield view, there[np.linspace(0, len(there) - 1, n).round().astype(int)]
