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
from ..data.stores import TokenStore
from ..data.transfer import StoredRows, fill_rows
from .config import ExtractConfig
from .frozen import FrozenBackbone, build_frozen
from .stage import open_stores

# What float16 and another order of summation do stays far above; another resizing or another decoder far below.
LEAST_COSINE = 0.9999
# How far a token may be from the stored one, as a share of its length: the same angle, and nothing for another scale.
LARGEST_DISTANCE = (2 * (1 - LEAST_COSINE)) ** 0.5


@dataclass(frozen=True)
class Adoption:
    """What was accepted: the store's new digest, the fields that differ, the sample and how near it came."""

    name: str
    changes: list[str]
    n_sampled: int
    least_cosine: float
    largest_error: float
    n_rows: int


def modality_of(cache: Cache, name: str) -> str:
    """Return the modality of the store `name`; raises CacheError if there is none, or if it was imported."""
    identities = cache.all_identities()
    known = {digest: modality for modality, digest in identities}
    if name not in known:
        raise CacheError(f"{cache.path}: no tokens {name!r}. {nearest(name, known)}")
    if "imported" in identities[known[name], name]["input"]:
        raise CacheError(f"{cache.path}: {known[name]} tokens {name} were imported: nothing here makes them anew.")
    return known[name]


def adopt_tokens(
    cache: Cache, table: ClipTable, name: str, data: DataConfig, config: ExtractConfig, n_sample: int
) -> Adoption:
    """Copy the tokens of the store `name` to the identity that `data` and `config` have now, if a sample agrees.

    n_sample: clips that are made anew in each view, spread over the table.  Raises CacheError if there is no such
    store, if its clips are not those of the table, or if a token of the sample is not the stored one: a cosine below
    0.9999, or as far away for its length.
    """
    modality = modality_of(cache, name)
    cache.add_clips(table)
    store = open_stores(cache, data.model_copy(update={"modalities": (modality,)}), config)[modality]
    if store.path.stem == name:
        raise CacheError(f"{cache.path}: {modality} tokens {name} have the identity asked for already. Use them so.")
    identities = cache.identities(modality)
    changes = differences(identities[name], identities[store.path.stem])
    stored = [StoredRows(cache, modality, name, view) for view in range(cache.n_views(modality, name))]
    theirs = TokenStore.open(cache.tokens_path(modality, name))
    if (theirs.k, theirs.width) != (store.k, store.width):
        raise CacheError(f"{theirs.path}: tokens of another shape ({'; '.join(changes)}). Extract again.")
    cosine, distance, error, n_sampled = _compare(cache, table, stored, modality, data, config, n_sample)
    if not (cosine >= LEAST_COSINE and distance <= LARGEST_DISTANCE):
        raise CacheError(
            f"{cache.path}: {modality} tokens {name} are not what is made now: of {n_sampled} clips the least cosine "
            f"is {cosine:.5f}, expected {LEAST_COSINE}, and the largest distance {distance:.5f} of a token's length, "
            f"expected {LARGEST_DISTANCE:.5f} ({'; '.join(changes)}). Extract again."
        )
    about = {"adopted_from": name, "least_cosine": cosine, "largest_error": error, "clips_sampled": n_sampled}
    n_rows = 0
    for view, rows in enumerate(stored):
        place = (modality, store.path.stem, view)
        n_rows += fill_rows(cache, store.grown(1, view + 1), place, rows.held(), rows.read, about)
    return Adoption(store.path.stem, changes, n_sampled, cosine, error, n_rows)


def _compare(
    cache: Cache,
    table: ClipTable,
    stored: list[StoredRows],
    modality: str,
    data: DataConfig,
    config: ExtractConfig,
    n: int,
) -> tuple[float, float, float, int]:
    """Make some clips of every view anew.

    Returns the least cosine of a token, the largest distance for its length, the largest difference of a value, and
    the number of clips; a value that is not finite makes all of these not finite.
    """
    found, n_sampled = [], 0
    backbone = FrozenBackbone(modality, build_frozen(modality, data, config), config, choose_device(config.device))
    with ReaderPool(config.readers, data) as readers:
        for view, rows in enumerate(stored):
            chosen = _chosen(cache, table, rows, n)
            n_sampled = max(n_sampled, len(chosen))
            for at in range(0, len(chosen), config.batch_size):
                batch = chosen[at : at + config.batch_size]
                futures = readers.submit([(table.clip(row), view, (modality,)) for row in batch])
                arrays = {place: _array(future.result()[modality], modality) for place, future in enumerate(futures)}
                olds = rows.read(cache.rows(table.clip_ids[batch]))
                for (_, old, _), new in zip(olds, backbone.tokens(arrays).values(), strict=True):
                    assert old is not None  # only what is present was chosen
                    found.append(_difference(old.astype(np.float32), new))
    if not found:
        raise CacheError(f"{cache.path}: holds no clip of {table.path} to compare with. Extract again.")
    cosines, distances, errors = np.array(found).T
    return float(cosines.min()), float(distances.max()), float(errors.max()), n_sampled


def _chosen(cache: Cache, table: ClipTable, stored: StoredRows, n: int) -> np.ndarray:
    """Return n rows of the table, or fewer, spread over those that a view has as the table has them."""
    rows = cache.rows(table.clip_ids)
    is_current = stored.held() == cache.row_digests()
    usable = np.flatnonzero((stored.states() == PRESENT)[rows] & is_current[rows])
    return usable[np.unique(np.linspace(0, len(usable) - 1, n).round().astype(int))] if len(usable) else usable


def _difference(old: np.ndarray, new: np.ndarray) -> tuple[float, float, float]:
    """Return the least cosine, the largest distance for the length, and the largest difference of tokens [k, D]."""
    lengths, apart = np.linalg.norm([old, new], axis=2), np.linalg.norm(old - new, axis=1)
    cosine = np.where(apart == 0, 1.0, (old * new).sum(axis=1) / np.maximum(lengths.prod(axis=0), 1e-12))
    return cosine.min(), (apart / np.maximum(lengths.max(axis=0), 1e-12)).max(), np.abs(old - new).max()


def _array(reading: Reading, modality: str) -> np.ndarray:
    if reading.array is None:
        state = f"{STATE_NAMES[reading.state]} now {reading.reason}".strip()
        raise CacheError(f"A clip whose {modality} was present is {state}. Extract again.")
    return reading.array
