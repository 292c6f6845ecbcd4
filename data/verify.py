"""Is every byte of a cache what was written?  Shards against the checksums of their receipts, logits against theirs."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cache import Cache
from .errors import CacheError
from .inventory import logit_names
from .modality import PRESENT, STATE_NAMES, UNWRITTEN
from .publish import read_json_files
from .shards import shard_file
from .stores import LogitStore, TokenStore

# Hashing frees the interpreter, so two threads keep two cores, or a disk, busy.
N_THREADS = 2


@dataclass(frozen=True)
class Damage:
    """A file of a cache that is not what was written, and the clips whose data it holds."""

    file: Path
    reason: str
    clips: tuple[str, ...] = ()
    shard: tuple[str, str, int, int] | None = None  # modality, digest, view, number

    def __str__(self) -> str:
        """Return it as one line."""
        some = f"; {len(self.clips)} clips: {', '.join(self.clips[:5])}" if self.clips else ""
        return f"{self.file}: {self.reason}{some}{', ...' if len(self.clips) > 5 else ''}"


def count_shards(cache: Cache) -> int:
    """Return how many shards `verify` will read."""
    return sum(len(receipts) for *_, receipts in _stores(cache))


def verify(cache: Cache, advance: Callable[[], object] = lambda: None) -> Iterator[Damage]:
    """Read every shard that has a receipt, and all logits, and yield what is damaged; `advance` after each shard."""
    with ThreadPoolExecutor(N_THREADS) as pool:
        for modality, name, view, receipts in _stores(cache):
            path = cache.tokens_path(modality, name)
            try:
                store = TokenStore.open(path)
            except (CacheError, ValueError, KeyError) as error:
                yield Damage(path, f"cannot be opened: {error}")
                continue

            def check(item: tuple[str, Any], store: TokenStore = store, view: int = view) -> str:
                return _wrong(store, view, int(item[0]), item[1])

            for (shard, receipt), reason in zip(receipts.items(), pool.map(check, receipts.items()), strict=True):
                advance()
                if reason:
                    file = shard_file(path / "tokens", int(shard), view)
                    yield Damage(file, reason, _clips(cache, receipt), (modality, name, view, int(shard)))
    for name in logit_names(cache):
        yield from _wrong_logits(cache.logits_path(name))


def _stores(cache: Cache) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Yield modality, digest, view and all receipts of a view, those of missing files too."""
    for modality, name in cache.all_identities():
        for view in range(cache.n_views(modality, name)):
            found = read_json_files(cache.receipts(modality, name) / f"view{view}")
            yield modality, name, view, dict(sorted(found.items(), key=lambda item: int(item[0])))


def _wrong(store: TokenStore, view: int, shard: int, receipt: dict[str, Any]) -> str:
    """Return what is wrong with a shard; '' if nothing is."""
    try:
        data, state = store.read_shard(shard, view)
        if len(data) != receipt["bytes"]:
            return f"has {len(data)} bytes, its receipt says {receipt['bytes']}"
        if hashlib.sha256(data).hexdigest() != receipt["sha256"]:
            return "fails its checksum"
        if hashlib.sha256(state).hexdigest() != receipt["state_sha256"]:
            return "its state fails the checksum"
        tokens, states = store.decoded(data, state)
    except CacheError as error:
        return str(error)
    except KeyError as error:
        return f"its receipt does not say {error}"
    counts = {name: int((states == state).sum()) for state, name in STATE_NAMES.items()}
    if {name: n for name, n in counts.items() if n} != receipt["counts"]:
        return f"its states count {counts}, its receipt says {receipt['counts']}"
    finite = np.isfinite(tokens).all(axis=(1, 2))
    if not np.array_equal(finite, states == PRESENT):
        return "holds tokens of clips that are not present, or none of clips that are"
    asked = [bool(row) for row in receipt["rows"]]
    return "" if np.array_equal(states[: len(asked)] != UNWRITTEN, asked) else "states and rows of its receipt differ"


def _clips(cache: Cache, receipt: dict[str, Any]) -> tuple[str, ...]:
    first = receipt.get("first_row", 0)
    rows = (first + at for at, row in enumerate(receipt.get("rows", ())) if row)
    return tuple(cache.clip_ids[row] for row in rows if row < cache.n_clips)


def _wrong_logits(path: Path) -> Iterator[Damage]:
    try:
        store = LogitStore.open(path)
    except (CacheError, OSError, ValueError, KeyError) as error:
        yield Damage(path, f"cannot be read: {error}")
        return
    for array in store.damaged():
        yield Damage(path / array, "fails its checksum. Remove the store and run karmma train-teacher again")
