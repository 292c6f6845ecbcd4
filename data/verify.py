"""Is every byte of a cache what was written?  Shards against the checksums of their receipts, logits against theirs."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .cache import Cache
from .config import digest
from .errors import CacheError, printable
from .inventory import logit_names
from .modality import PRESENT, STATE_NAMES, UNWRITTEN
from .publish import read_json
from .shards import shard_file, state_file
from .stores import LogitStore, TokenStore

# Hashing frees the interpreter, so two threads keep two cores, or a disk, busy.
N_THREADS = 2
LOOKS, LOOK_AGAIN_S = 4, 0.5
# Shards found sound: store, view and number.
Sound = set[tuple[str, int, int]]


@dataclass(frozen=True)
class Damage:
    """A file of a cache that is not what was written, and the clips whose data it holds."""

    file: Path
    reason: str
    clips: tuple[str, ...] = ()
    shard: tuple[str, str, int, int] | None = None  # modality, digest, view, number
    logits: str | None = None  # teacher digest

    def __str__(self) -> str:
        """Return it as one line."""
        some = f"; {len(self.clips)} clips: {', '.join(self.clips[:5])}" if self.clips else ""
        return printable(f"{self.file}: {self.reason}{some}{', ...' if len(self.clips) > 5 else ''}")


class _DamageError(CacheError):
    """A file is not what its receipt says."""

    def __init__(self, file: Path, reason: str) -> None:
        self.file, self.reason = file, reason
        super().__init__(f"{file}: {reason}")


class FirstSight:
    """Holds shards against their receipts, each once, when somebody is about to read from it.

    sound: those that need not be looked at; several may share it.
    """

    def __init__(self, cache: Cache, stores: Mapping[str, TokenStore], sound: Sound | None = None) -> None:
        self.cache, self.stores, self._sound = cache, stores, set() if sound is None else sound

    def __call__(self, modality: str, rows: np.ndarray, view: int) -> None:
        """Raise CacheError, which names the file and its clips, if a shard that holds one of `rows` is damaged."""
        store = self.stores[modality]
        for shard in np.unique(rows // store.shard_rows).tolist():
            this = str(store.path), view, shard
            if this not in self._sound:
                self._look(modality, store, view, shard)
                self._sound.add(this)

    def _look(self, modality: str, store: TokenStore, view: int, shard: int) -> None:
        for again in range(LOOKS):
            receipt = self.cache.receipt(modality, store.path.stem, view, shard)
            try:
                _whole(store, view, shard, receipt)
                return
            except _DamageError as error:
                found = Damage(error.file, error.reason, _clips(self.cache, store, shard, receipt))
            if again < LOOKS - 1:  # a shard that is just being made anew has another receipt, or none
                time.sleep(LOOK_AGAIN_S)
        raise CacheError(f"{found}. Run karmma cache verify --drop, then karmma extract.")


def count_shards(cache: Cache) -> int:
    """Return how many shards `verify` will read."""
    return sum(len(receipts) for *_, receipts in _stores(cache))


def verify(cache: Cache, advance: Callable[[], object] = lambda: None) -> Iterator[Damage]:
    """Read every shard that has a receipt, and all logits, and yield what is damaged; `advance` after each shard."""
    yield from _wrong_identities(cache)
    with ThreadPoolExecutor(N_THREADS) as pool:
        for modality, name, view, receipts in _stores(cache):
            path = cache.tokens_path(modality, name)
            try:
                store = TokenStore.open(path)
            except CacheError as error:
                yield Damage(path, f"cannot be opened: {error}", _held(cache, modality, name, view))
                continue

            check = partial(_wrong, store, view)
            for shard, (file, reason) in zip(receipts, pool.map(check, receipts, receipts.values()), strict=True):
                advance()
                if reason:
                    clips = _clips(cache, store, shard, receipts[shard])
                    yield Damage(file, reason, clips, (modality, name, view, shard))
    for name in logit_names(cache):
        yield from _wrong_logits(cache, name)


def _stores(cache: Cache) -> Iterator[tuple[str, str, int, dict[int, dict[str, Any] | None]]]:
    """Yield modality, digest, view and all receipts of a view, those of missing files too."""
    for modality in cache.modalities():
        for name in cache.store_names(modality):
            for view in range(cache.n_views(modality, name)):
                yield modality, name, view, cache.found_receipts(modality, name, view)


def _wrong_identities(cache: Cache) -> Iterator[Damage]:
    """Yield each identity that is not there or not the one whose digest names its store."""
    for modality in cache.modalities():
        for name in cache.store_names(modality):
            file = cache.receipts(modality, name) / "identity.json"
            try:
                if digest(read_json(file)) != name:
                    yield Damage(file, "is not what its store was made from. Delete it, then run karmma extract")
            except FileNotFoundError:
                yield Damage(file, "is missing: nothing says what the tokens are. Run karmma extract")
            except CacheError as error:
                yield Damage(file, str(error))


def _wrong(store: TokenStore, view: int, shard: int, receipt: dict[str, Any] | None) -> tuple[Path, str]:
    """Return what is wrong with a shard, '' if nothing is, and the file that is at fault."""
    file = shard_file(store.path / "tokens", shard, view)
    try:
        tokens, states = store.decoded(*_whole(store, view, shard, receipt))
    except _DamageError as error:
        return error.file, error.reason
    except CacheError as error:
        return file, str(error).removeprefix(f"{file}: ")
    assert receipt is not None  # `_whole` takes no shard without one
    counts = {name: int((states == state).sum()) for state, name in STATE_NAMES.items()}
    if {name: n for name, n in counts.items() if n} != receipt["counts"]:
        return file, f"its states count {counts}, its receipt says {receipt['counts']}"
    finite = np.isfinite(tokens).all(axis=(1, 2))
    if not np.array_equal(finite, states == PRESENT):
        return file, "holds tokens of clips that are not present, or none of clips that are"
    asked = [bool(row) for row in receipt["rows"]]
    same = np.array_equal(states[: len(asked)] != UNWRITTEN, asked)
    return file, "" if same else "states and rows of its receipt differ"


def _whole(store: TokenStore, view: int, shard: int, receipt: dict[str, Any] | None) -> tuple[bytes, bytes]:
    """Return the bytes of a shard's two files; raise CacheError unless they are what its receipt says."""
    file = shard_file(store.path / "tokens", shard, view)
    if receipt is None:
        raise _DamageError(file, "its receipt is damaged")
    if receipt["first_row"] != shard * store.shard_rows:
        raise _DamageError(file, f"its receipt is of the shard from row {receipt['first_row']} on")
    tokens, state = store.read_shard(shard, view)
    if len(tokens) != receipt["bytes"]:
        raise _DamageError(file, f"has {len(tokens)} bytes, its receipt says {receipt['bytes']}")
    if hashlib.sha256(tokens).hexdigest() != receipt["sha256"]:
        raise _DamageError(file, "fails its checksum")
    if hashlib.sha256(state).hexdigest() != receipt["state_sha256"]:
        raise _DamageError(state_file(store.path / "state", shard, view), "fails its checksum")
    return tokens, state


def _clips(cache: Cache, store: TokenStore, shard: int, receipt: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the clips of a shard, by its place: all that may be in it, where the receipt does not tell."""
    first = shard * store.shard_rows
    rows = receipt["rows"] if receipt else ("?",) * store.shard_rows
    return tuple(clip_id for clip_id, row in zip(cache.clip_ids[first:], rows, strict=False) if row)


def _held(cache: Cache, modality: str, name: str, view: int) -> tuple[str, ...]:
    held = cache.held(modality, name, view)
    return tuple(clip_id for clip_id, row in zip(cache.clip_ids, held, strict=True) if row)


def _wrong_logits(cache: Cache, name: str) -> Iterator[Damage]:
    path, clips = cache.logits_path(name), tuple(cache.clip_ids)
    try:
        store = LogitStore.open(path)
    except CacheError as error:
        yield Damage(path, f"cannot be read: {str(error).removeprefix(f'{path}: ')}", clips, logits=name)
        return
    for array in store.damaged():
        yield Damage(path / array, "fails its checksum", clips[: store.n_clips], logits=name)
