"""Batches of cached tokens: a plan one can print, and a reader that stays one batch ahead of the training step."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .modality import PRESENT, UNWRITTEN
from .stores import TokenStore


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


class TokenReader:
    """Reads batches of several modalities from their stores by two threads, one batch ahead.

    cache_rows: [N] row in the cache of every clip of the table.
    """

    def __init__(self, stores: Mapping[str, TokenStore], cache_rows: np.ndarray) -> None:
        self.stores, self.cache_rows = dict(stores), cache_rows
        self._states: dict[tuple[str, int], np.ndarray] = {}
        self._locks = {modality: threading.Lock() for modality in self.stores}

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
        with ThreadPoolExecutor(2) as pool:
            ahead = self._submit(pool, plan[0], view) if plan else {}
            for at, rows in enumerate(plan):
                now, ahead = ahead, self._submit(pool, plan[at + 1], view) if at + 1 < len(plan) else {}
                tokens = {m: torch.from_numpy(future.result()) for m, future in now.items()}
                yield TokenBatch(rows, tokens, torch.from_numpy(self.present(rows, view)))

    def _submit(self, pool: ThreadPoolExecutor, rows: np.ndarray, view: int) -> dict[str, Future]:
        return {m: pool.submit(self._read, m, rows, view) for m in self.stores}

    def _read(self, modality: str, rows: np.ndarray, view: int) -> np.ndarray:
        with self._locks[modality]:
            return self.stores[modality].read_written(self.cache_rows[rows], view)
