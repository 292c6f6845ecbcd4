"""Train the teacher's fusion head from the cache, then let it speak for every clip.

Nothing at import needs torch: a run that is there already is found without it.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.annotations import ClipTable
from ..data.cache import Cache
from ..data.config import PLACES, DataConfig, digest
from ..data.errors import StaleCacheError, TableError
from ..data.runs import RunFolder
from ..data.selection import Selection, select_stores
from ..data.stores import TokenStore
from .config import NOT_DECISIVE, TeacherConfig

logger = logging.getLogger(__name__)


@dataclass
class TeacherReport:
    """Where the teacher's run and logits are, and what it was trained on."""

    run: Path
    logits: Path
    modalities: tuple[str, ...]
    result: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    was_there: bool = False


def train_teacher(table: ClipTable, data: DataConfig, config: TeacherConfig) -> TeacherReport:
    """Train on every modality that is complete in the cache; write the run folder and the logit store.

    The run's name is a digest of all that decides its result, so the same call again finds it and does nothing.
    Raises IncompleteCacheError or StaleCacheError if the cache is not what `data` asks for, TableError if there is
    nothing to learn from.
    """
    plan = plan_teacher(table, data, config)
    cache, run, was_there = plan.cache, plan.run, plan.is_done
    if not was_there:
        from .ranks import joined
        from .teacher import Teacher
        from .training import prepare

        with joined(prepare(config)) as device:
            teacher = Teacher(cache, table, plan.selection, data, config, device)
            # A finished run whose logits are gone (a cache made anew) need not be trained again.
            if run.is_finished:
                teacher.speak(run, plan.described)
            else:
                teacher.train(run, plan.described)
    logits = cache.logits_path(run.result["teacher"])
    return TeacherReport(run.path, logits, plan.modalities, run.result, plan.selection.left_out, was_there)


@dataclass(frozen=True)
class TeacherPlan:
    """A training that could begin: from what, into which run folder; described: all that decides its result."""

    cache: Cache
    selection: Selection
    described: dict[str, Any]
    run: RunFolder

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those to train on."""
        return tuple(self.selection.stores)

    @property
    def is_done(self) -> bool:
        """Whether the run came to its end before, and its logits are in the cache."""
        return self.run.is_finished and self.cache.logits_path(self.run.result["teacher"]).exists()


def plan_teacher(table: ClipTable, data: DataConfig, config: TeacherConfig) -> TeacherPlan:
    """Return what `train_teacher` would do, and raise what it would raise before it begins; nothing is written."""
    require_labels(table, data.heads)
    cache = Cache.open(data.cache)
    selection = usable_selection(cache, table, data, config)
    for modality, reason in selection.left_out.items():
        logger.warning("Left out %s: %s", modality, reason)
    described = describe_run(cache, table, data, config, selection)
    return TeacherPlan(cache, selection, described, RunFolder(data.runs / f"teacher-{digest(described)[:8]}"))


def usable_selection(cache: Cache, table: ClipTable, data: DataConfig, config: TeacherConfig) -> Selection:
    """Return the stores to train from.  Raises IncompleteCacheError or StaleCacheError if they cannot be used so."""
    selection = select_stores(cache, table, data, config.tokens)
    for modality, name in selection.names.items():
        cache.require_usable(modality, name, table.clip_ids, config.allow_failures)
    require_theta(cache, selection, config)
    return selection


def require_labels(table: ClipTable, heads: tuple[str, ...]) -> None:
    """Raise TableError unless every head has two classes, and train and val each a clip labelled in it."""
    for head in heads:
        if len(table.classes(head)) < 2:
            raise TableError(
                f"{table.path}: column {head!r} has {len(table.classes(head))} class(es), expected two or more. "
                "Label more clips, or name other columns with --heads."
            )
    for split in ("train", "val"):
        for head in heads:
            if not (table.labels(head)[table.rows(split)] >= 0).any():
                raise TableError(
                    f"{table.path}: no clip of split {split!r} has a label in column {head!r}. "
                    "Training needs labelled clips in 'train' and 'val'."
                )


def require_theta(cache: Cache, selection: Selection, config: TeacherConfig) -> None:
    """Raise StaleCacheError if config.theta would average tokens that were averaged already."""
    for modality, name in selection.names.items():
        cached, k = cache.identities(modality)[name]["theta"], selection.stores[modality].k
        if config.theta is not None and cached is not None and config.theta < k == cached:
            raise StaleCacheError(
                f"{selection.stores[modality].path}: {modality} was extracted with theta {cached}, this run asks for "
                f"theta {config.theta}: averages of averages are not the averages of all tokens. "
                "Extract with --theta none."
            )


def describe_run(
    cache: Cache, table: ClipTable, data: DataConfig, config: TeacherConfig, selection: Selection
) -> dict[str, Any]:
    """Return all that decides a teacher: settings, inputs, tokens, clips as the table names them, labels."""
    n_views = selection.n_views
    return {
        "kind": "teacher",
        "settings": config.model_dump(mode="json", exclude={*NOT_DECISIVE, "tokens"}),
        "data": data.model_dump(mode="json", exclude={*PLACES}),
        "inputs": {modality: cache.identities(modality)[name]["input"] for modality, name in selection.names.items()},
        "tokens": selection.names,
        "made_by": {
            modality: _made_by(cache.identities(modality)[name], selection.stores[modality])
            for modality, name in selection.names.items()
        },
        "views": n_views,
        "contents": {m: cache.contents_digest(m, name, n_views) for m, name in selection.names.items()},
        "clips": table.content_digest(),
        "classes": {head: list(table.classes(head)) for head in data.heads},
    }


def _made_by(identity: dict[str, Any], store: TokenStore) -> dict[str, Any]:
    """Return what made a store's tokens: backbone and Theta; and what they are, [k, D]."""
    return {**identity["backbone"], "theta": identity["theta"], "shape": [store.k, store.width]}
