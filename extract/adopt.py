"""Accept tokens that were made under an older identity, after a sample of them has been made anew.

A new version of the decoder or of our own reading changes every identity, even where no token changes.
"""

from dataclasses import dataclass

import numpy as np

from ..data.annotations import ClipTable
from ..data.cache import Cache
from ..data.config import DataConfig
from ..data.device import choose_device
from ..data.errors import CacheError, nearest
from ..data.identity import differences
from ..data.media import Reading
from ..data.modality import PRESENT, STATE_NAMES
from ..data.readers import ReaderPool
from ..data.transfer import StoredRows, fill_rows
from .config import ExtractConfig
from .frozen import FrozenBackbone, build_frozen
from .stage import open_stores

# What float16 and another order of summation do stays far above; another resizing or another decoder far below.
LEAST_COSINE = 0.9999


@dataclass(frozen=True)
class Adoption:
    """What was accepted: the store's new digest, the fields that differ, the sample and how near it came."""

    name: str
    changes: list[str]
    n_sampled: int
    least_cosine: float
    largest_error: float
    n_rows: int


def adopt_tokens(
    cache: Cache, table: ClipTable, name: str, data: DataConfig, config: ExtractConfig, n_sample: int
) -> Adoption:
    """Copy the tokens of the store `name` to the identity that `data` and `config` have now, if a sample agrees.

    n_sample: clips that are made anew, spread over the table.  Raises CacheError if there is no such store, if its
    clips are not those of the table, or if one of the sample's tokens has a cosine below 0.9999 to the stored one.
    """
    known = {digest: modality for modality, digest in cache.all_identities()}
    if name not in known:
        raise CacheError(f"{cache.path}: no tokens {name!r}. {nearest(name, known)}")
    modality = known[name]
    cache.add_clips(table)
    store = open_stores(cache, data.model_copy(update={"modalities": (modality,)}), config)[modality]
    if store.path.stem == name:
        raise CacheError(f"{cache.path}: {modality} tokens {name} have the identity asked for already. Use them so.")
    identities = cache.identities(modality)
    changes = differences(identities[name], identities[store.path.stem])
    stored = StoredRows(cache, modality, name, 0)
    if (stored.store.k, stored.store.width) != (store.k, store.width):
        raise CacheError(f"{stored.store.path}: tokens of another shape ({'; '.join(changes)}). Extract again.")
    cosine, error, n_sampled = _compare(cache, table, stored, modality, data, config, n_sample)
    if not cosine >= LEAST_COSINE:
        raise CacheError(
            f"{cache.path}: {modality} tokens {name} are not what is made now: of {n_sampled} clips the least cosine "
            f"is {cosine:.5f}, expected {LEAST_COSINE} ({'; '.join(changes)}). Extract again."
        )
    about = {"adopted_from": name, "least_cosine": cosine, "largest_error": error, "clips_sampled": n_sampled}
    n_rows = 0
    for view in range(cache.n_views(modality, name)):
        rows = StoredRows(cache, modality, name, view)
        place = (modality, store.path.stem, view)
        n_rows += fill_rows(cache, store.grown(1, view + 1), place, cache.held(modality, name, view), rows.read, about)
    return Adoption(store.path.stem, changes, n_sampled, cosine, error, n_rows)


def _compare(
    cache: Cache, table: ClipTable, stored: StoredRows, modality: str, data: DataConfig, config: ExtractConfig, n: int
) -> tuple[float, float, int]:
    """Make some clips anew; return the least cosine of a token, the largest difference of a value, and the number."""
    rows = cache.rows(table.clip_ids)
    held = cache.held(modality, stored.store.path.stem, 0)
    usable = np.flatnonzero((stored.states()[rows] == PRESENT) & (held[rows] == cache.row_digests()[rows]))
    if not len(usable):
        raise CacheError(f"{stored.store.path}: holds no clip of {table.path} to compare with. Extract again.")
    chosen = usable[np.unique(np.linspace(0, len(usable) - 1, n).round().astype(int))]
    backbone = FrozenBackbone(modality, build_frozen(modality, data, config), config, choose_device(config.device))
    cosine, error = 1.0, 0.0
    with ReaderPool(config.readers, data) as readers:
        for at in range(0, len(chosen), config.batch_size):
            batch = chosen[at : at + config.batch_size]
            futures = readers.submit([(table.clip(row), 0, (modality,)) for row in batch])
            arrays = {place: _array(future.result()[modality], modality) for place, future in enumerate(futures)}
            for (_, old, _), new in zip(stored.read(rows[batch]), backbone.tokens(arrays).values(), strict=True):
                old = old.astype(np.float32)
                norms = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
                cosine = min(cosine, float(((old * new).sum(axis=1) / np.maximum(norms, 1e-12)).min()))
                error = max(error, float(np.abs(old - new).max()))
    return cosine, error, len(chosen)


def _array(reading: Reading, modality: str) -> np.ndarray:
    if reading.state != PRESENT:
        state = f"{STATE_NAMES[reading.state]} now {reading.reason}".strip()
        raise CacheError(f"A clip whose {modality} was present is {state}. Extract again.")
    return reading.array
