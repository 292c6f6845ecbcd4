"""Batches of cached tokens: a plan one can print, and a reader that stays one batch ahead of the training step."""

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .modality import PRESENT, UNWRITTEN
from .stores import TokenStore

# Reading is copying: more threads than this gain nothing, and training wants the other cores.
N_THREADS = 2


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of B clips in one view.

    rows: [B] places in the clip table.  tokens: modality -> [B, k, D] float16, NaN where missing.
    present: [B, M] bool, columns in the order of `tokens`.
    """

    rows: np.ndarray
    tokens: dict[str, Tensor]
    present: Tensor


def plan_epoch(rows: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of one epoch: every row once, in an order that only (seed, epoch) decides."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _count_when_free() -> int:
    """Return what getrefcount says of an array that a list and a loop know and nobody else: Pythons differ."""
    return next(sys.getrefcount(held) for held in [np.empty(0)])


FREE = _count_when_free()


class _Buffers:
    """Memory for batches, used again once nobody holds anything that lies in it: fresh memory costs as much as reading.

    pin: page-locked memory for a GPU, which torch itself uses again, after the copies that are under way.
    """

    def __init__(self, pin: bool) -> None:
        self.pin = pin
        self._held: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array float16 of this shape, with any contents."""
        if self.pin:
            return torch.empty(shape, dtype=torch.float16, pin_memory=True).numpy()
        size = int(np.prod(shape))
        for held in self._held:
            # A batch knows the array that it is a part of.
            if len(held) >= size and sys.getrefcount(held) == FREE:
                return held[:size].reshape(shape)
        self._held.append(np.empty(size, np.float16))
        return self._held[-1].reshape(shape)


class TokenReader:
    """Reads batches of several modalities from their stores by two threads, one batch ahead.

    cache_rows: [N] row in the cache of every clip of the table.  pin: the tokens go to a GPU.  check: called with
    modality, rows of the cache and view before they are read, by either thread.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        cache_rows: np.ndarray,
        pin: bool = False,
        check: Callable[[str, np.ndarray, int], None] = lambda *_: None,
    ) -> None:
        self.stores, self.cache_rows, self.check = dict(stores), cache_rows, check
        self._states: dict[tuple[str, int], np.ndarray] = {}
        self._buffers = {modality: _Buffers(pin) for modality in self.stores}

    def states(self, modality: str, view: int) -> np.ndarray:
        """Return the state [N] of every clip of the table in a view."""
        if (modality, view) not in self._states:
            self._states[modality, view] = self.stores[modality].state(self.cache_rows, view)
        return self._states[modality, view]

    def present(self, rows: np.ndarray, view: int) -> np.ndarray:
        """Return present [n, M] bool of table rows."""
        return np.stack([self.states(m, view)[rows] == PRESENT for m in self.stores], axis=1)

    def written(self, rows: np.ndarray, view: int) -> np.ndarray:
        """Say for each table row [n] whether every modality was extracted in this view."""
        return np.all([self.states(m, view)[rows] != UNWRITTEN for m in self.stores], axis=0)

    def batches(self, plan: list[np.ndarray], view: int) -> Iterator[TokenBatch]:
        """Yield the plan's batches in order; one is read while the one before is used."""
        with ThreadPoolExecutor(N_THREADS) as pool:
            ahead = self._submit(pool, plan[0], view) if plan else {}
            for at, rows in enumerate(plan):
                now, ahead = ahead, self._submit(pool, plan[at + 1], view) if at + 1 < len(plan) else {}
                tokens = {modality: self._read(*now.pop(modality)) for modality in self.stores}
                yield TokenBatch(rows, tokens, torch.from_numpy(self.present(rows, view)))

    def _submit(
        self, pool: ThreadPoolExecutor, rows: np.ndarray, view: int
    ) -> dict[str, tuple[np.ndarray, list[Future[None]]]]:
        """Have the clips of a batch read, an equal part of each modality by every thread."""
        parts = {}
        for modality, store in self.stores.items():
            out = self._buffers[modality].take((len(rows), store.k, store.width))
            pieces = zip(*(np.array_split(values, N_THREADS) for values in (self.cache_rows[rows], out)), strict=True)
            parts[modality] = out, [pool.submit(self._fill, modality, part, view, piece) for part, piece in pieces]
        return parts

    def _fill(self, modality: str, rows: np.ndarray, view: int, out: np.ndarray) -> None:
        self.check(modality, rows, view)
        self.stores[modality].read_written(rows, view, out)

    def _read(self, out: np.ndarray, parts: list[Future[None]]) -> Tensor:
        for part in parts:
            part.result()
        return torch.from_numpy(out)
