"""Which token stores a table and its settings mean: complete, and made from the inputs that are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .annotations import ClipTable
from .cache import Cache, table_digests
from .config import DataConfig
from .errors import CacheError, IncompleteCacheError, StaleCacheError, nearest
from .identity import differences, input_identity
from .modality import is_own
from .stores import TokenStore


@dataclass
class Selection:
    """The stores in use by modality, their digests, and why any other modality is left out."""

    stores: dict[str, TokenStore] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    n_views: int = 1


def select_stores(cache: Cache, table: ClipTable, data: DataConfig, chosen: Mapping[str, str]) -> Selection:
    """Find for each of data.modalities the one complete store whose inputs are those of `data`.

    chosen: modality -> digest, where a cache has several.  A modality that was never extracted is left out with the
    reason.  Raises IncompleteCacheError for one that is not complete or if there is none, StaleCacheError for
    one that was extracted under other settings, CacheError for several that fit, naming the differences.
    """
    selection = Selection()
    for modality in data.modalities:
        fitting = fitting_stores(cache, modality, data)
        if modality in chosen and chosen[modality] not in fitting:
            hint = nearest(chosen[modality], fitting)
            raise CacheError(f"{cache.path}: no {modality} tokens {chosen[modality]!r}. {hint}")
        asked = {name: store for name, store in fitting.items() if chosen.get(modality, name) == name}
        missing = {name: n_missing(cache, table, modality, name) for name in asked}
        complete = [name for name, n in missing.items() if n == 0]
        if len(complete) > 1:
            raise CacheError(_several(cache, modality, complete))
        if complete:
            selection.names[modality] = complete[0]
            selection.stores[modality] = asked[complete[0]]
            continue
        n = min(missing.values(), default=table.n_clips)
        command, done = ("cache import", "imported") if is_own(modality) else ("extract", "extracted")
        said = f"{n} of {table.n_clips} clips are not {done} as the table has them"
        if asked:  # begun, or damaged since: to go on without it would pass for what was asked
            raise IncompleteCacheError(
                f"{cache.path}: {modality}: {said}. Run karmma {command}, or name the other modalities with --modality."
            )
        selection.left_out[modality] = said
    if not selection.stores:
        reasons = ", ".join(f"{modality}: {reason}" for modality, reason in selection.left_out.items())
        commands = {"cache import" if is_own(modality) else "extract": None for modality in selection.left_out}
        steps = " and ".join(f"karmma {command}" for command in commands)
        raise IncompleteCacheError(f"{cache.path}: no modality is complete ({reasons}). Run {steps}.")
    selection.n_views = min(n_whole_views(cache, table, *item) for item in selection.stores.items())
    return selection


def n_whole_views(cache: Cache, table: ClipTable, modality: str, store: TokenStore) -> int:
    """Return how many views, from the clean one on, lack no clip that they ought to have."""
    gaps = (view for view in range(store.n_views) if n_missing(cache, table, modality, store.path.stem, view))
    return next(gaps, store.n_views)


def n_missing(
    cache: Cache, table: ClipTable, modality: str, name: str, view: int = 0, due: np.ndarray | None = None
) -> int:
    """Count the clips that a view ought to have and a store lacks: all of the table in view 0, else training clips.

    due: [N] bool, to ask about others.
    Receipts decide: a clip whose source or times are no longer those that its tokens were made from is missing.
    """
    if due is None:
        due = np.ones(table.n_clips, bool) if view == 0 else table.split == "train"
    held = cache.held(modality, name, view)[cache.rows(table.clip_ids)]
    return int((held[due] != table_digests(table)[due]).sum())


def fitting_stores(cache: Cache, modality: str, data: DataConfig) -> dict[str, TokenStore]:
    """Return by digest the stores whose inputs are those of `data`; raise StaleCacheError if there are only others."""
    wanted, identities = input_identity(modality, data), cache.identities(modality)
    # What imported features were made from is known to whoever imported them.
    inputs = {name: fields["input"] for name, fields in identities.items()}
    fitting = [name for name, found in inputs.items() if found == wanted or "imported" in found]
    if identities and not fitting:
        found = next(iter(identities.values()))["input"]
        said = "; ".join(differences(found, wanted, "input."))
        raise StaleCacheError(
            f"{cache.path}: {modality} was extracted under other settings: {said}. "
            "Extract again, or use the settings of the cache."
        )
    return {name: TokenStore.open(cache.tokens_path(modality, name)) for name in fitting}


def _several(cache: Cache, modality: str, names: list[str]) -> str:
    identities = cache.identities(modality)
    first = identities[names[0]]
    others = "; ".join(f"{name}: {', '.join(differences(first, identities[name]))}" for name in names[1:])
    return (
        f"{cache.path}: {len(names)} complete sets of {modality} tokens fit: {names[0]} and {others}. "
        f"Choose one with --set teacher.tokens.{modality}={names[0]}."
    )
