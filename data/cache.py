"""The cache folder: its own row order, the stores it holds, and the receipts that say which shards exist."""

import fcntl
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .annotations import ClipTable
from .config import digest
from .errors import CacheError, IncompleteCacheError
from .publish import publish, publish_json, read_json
from .shards import shard_file


class Cache:
    """A cache folder (design.md section 4): `clips.parquet`, `tokens/`, `logits/`, `receipts/`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._rows_file = self.path / "clips.parquet"
        self._read_rows()

    @classmethod
    def open(cls, path: Path | str) -> "Cache":
        """Open a cache that must be there already; raises CacheError if it is not."""
        if not (Path(path) / "clips.parquet").exists():
            raise CacheError(f"{path}: no cache here. Run karmma extract --cache {path} first.")
        return cls(path)

    def _read_rows(self) -> None:
        held = pq.read_table(self._rows_file).to_pydict() if self._rows_file.exists() else {}
        self.clip_ids: list[str] = held.get("clip_id", [])
        self.sources: list[str] = held.get("sources", [])
        self.labels: list[str] = held.get("labels", [])
        self._row_of = {clip_id: row for row, clip_id in enumerate(self.clip_ids)}

    @property
    def n_clips(self) -> int:
        """Rows of the cache, clips that left the table included."""
        return len(self.clip_ids)

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Hold the lock under which rows are added and arrays are resized."""
        folder = self.path / "leases"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / "planner.lock", "w")
        except OSError as error:
            raise CacheError(f"{folder}: {error.strerror}. Choose a folder that can be written.") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def add_clips(self, table: ClipTable) -> list[str]:
        """Give every clip of the table a row, new ones at the end; return what changed since the last snapshot.

        A clip whose source or times changed keeps its row; its shards are then found stale by their receipts.
        """
        labels = table.snapshot()
        with self.planning():
            self._read_rows()
            said, changed = [], False
            for sources, label in zip(table.slice_sources(), labels, strict=True):
                clip_id, source = sources[0], json.dumps(sources)
                row = self._row_of.get(clip_id)
                if row is None:
                    self._row_of[clip_id] = len(self.clip_ids)
                    self.clip_ids.append(clip_id)
                    self.sources.append(source)
                    self.labels.append(label)
                    changed = True
                    continue
                if self.sources[row] != source:
                    said.append(f"{clip_id}: source or times changed; it is extracted again")
                if self.labels[row] != label:
                    said.append(f"{clip_id}: labels were {self.labels[row]}, are {label}")
                changed |= self.sources[row] != source or self.labels[row] != label
                self.sources[row], self.labels[row] = source, label
            if changed:
                self._write_rows()
        return said

    def _write_rows(self) -> None:
        sink = pa.BufferOutputStream()
        columns = {"clip_id": self.clip_ids, "sources": self.sources, "labels": self.labels}
        pq.write_table(pa.table(columns), sink)
        publish(self._rows_file, sink.getvalue().to_pybytes())

    def rows(self, clip_ids: Sequence[str]) -> np.ndarray:
        """Return the cache's row [n] of each clip; raises IncompleteCacheError naming clips it has never seen."""
        unknown = [clip_id for clip_id in clip_ids if clip_id not in self._row_of]
        if unknown:
            raise IncompleteCacheError(
                f"{self.path}: {len(unknown)} clip(s) of the table are not in the cache, such as "
                f"{str(unknown[0])!r}. Run karmma extract again."
            )
        return np.array([self._row_of[clip_id] for clip_id in clip_ids], np.int64)

    def row_digests(self) -> np.ndarray:
        """Return for every row what a receipt records of it, [N]: a digest of clip id, sources and times."""
        return np.array([source_digest(source) for source in self.sources])

    # Stores and receipts ------------------------------------------------------------------------------------------

    def tokens_path(self, modality: str, name: str) -> Path:
        """Return where the token store with the identity digest `name` lies."""
        return self.path / "tokens" / modality / f"{name}.zarr"

    def logits_path(self, teacher: str) -> Path:
        """Return where the logits of a teacher digest lie."""
        return self.path / "logits" / f"{teacher}.zarr"

    def receipts(self, modality: str, name: str) -> Path:
        """Return the folder of a token store's receipts and its `identity.json`."""
        return self.path / "receipts" / "tokens" / modality / name

    def identities(self, modality: str) -> dict[str, dict[str, Any]]:
        """Return the identity of every token store of a modality, by digest."""
        folder = self.path / "receipts" / "tokens" / modality
        return {file.parent.name: read_json(file) for file in sorted(folder.glob("*/identity.json"))}

    def write_identity(self, modality: str, name: str, fields: dict[str, Any]) -> None:
        """Record what a store's digest stands for."""
        publish_json(self.receipts(modality, name) / "identity.json", fields)

    def receipt(self, modality: str, name: str, view: int, shard: int) -> dict[str, Any] | None:
        """Return the receipt of one shard; None if there is none or the shard's file is not of the size it names."""
        path = self.receipts(modality, name) / f"view{view}" / f"{shard}.json"
        if not path.exists():
            return None
        found = read_json(path)
        tokens = shard_file(self.tokens_path(modality, name) / "tokens", shard, view)
        return found if tokens.exists() and tokens.stat().st_size == found["bytes"] else None

    def write_receipt(self, modality: str, name: str, view: int, shard: int, receipt: dict[str, Any]) -> None:
        """Record that a shard is done; the last step of its making."""
        publish_json(self.receipts(modality, name) / f"view{view}" / f"{shard}.json", receipt)

    def drop_receipt(self, modality: str, name: str, view: int, shard: int) -> None:
        """Declare that a shard does not exist; the first step of superseding it."""
        (self.receipts(modality, name) / f"view{view}" / f"{shard}.json").unlink(missing_ok=True)

    def valid_receipts(self, modality: str, name: str, view: int) -> list[dict[str, Any]]:
        """Return the receipts of all shards of a view that exist."""
        files = (self.receipts(modality, name) / f"view{view}").glob("*.json")
        found = (self.receipt(modality, name, view, int(file.stem)) for file in files)
        return sorted((receipt for receipt in found if receipt), key=lambda receipt: receipt["first_row"])

    def held(self, modality: str, name: str, view: int) -> np.ndarray:
        """Return for every row [N] the digest under which a view's shards hold it, '' where they do not."""
        out = np.full(self.n_clips, "", "<U8")
        for receipt in self.valid_receipts(modality, name, view):
            rows = receipt["rows"]
            out[receipt["first_row"] : receipt["first_row"] + len(rows)] = rows
        return out

    def contents_digest(self, modality: str, name: str, n_views: int) -> str:
        """Return 16 hex digits over all tokens of a store, absent and failed clips included."""
        views = [self.valid_receipts(modality, name, view) for view in range(n_views)]
        return digest([[[receipt["sha256"], receipt["counts"]] for receipt in receipts] for receipts in views])

    def failures(self, modality: str, name: str, clip_ids: Iterable[str]) -> dict[str, str]:
        """Return clip id -> reason of every one of these clips that failed in any view of a store."""
        out: dict[str, str] = {}
        for folder in sorted(self.receipts(modality, name).glob("view*")):
            for receipt in self.valid_receipts(modality, name, int(folder.name.removeprefix("view"))):
                out |= {failure["clip_id"]: failure["reason"] for failure in receipt["failures"]}
        wanted = set(map(str, clip_ids))
        return {clip_id: reason for clip_id, reason in out.items() if clip_id in wanted}

    def require_usable(self, modality: str, name: str, clip_ids: Iterable[str], allow_failures: int) -> dict[str, str]:
        """Return the failures among these clips; raise IncompleteCacheError if there are more than allowed."""
        failures = self.failures(modality, name, clip_ids)
        if len(failures) > allow_failures:
            clip_id, reason = next(iter(failures.items()))
            raise IncompleteCacheError(
                f"{self.path}: {modality} of {len(failures)} clip(s) failed at extraction, such as "
                f"{clip_id}: {reason.rstrip('.')}. Mend them and run karmma extract --retry-failed, or "
                f"allow them with --allow-failures {len(failures)}."
            )
        return failures


def source_digest(source: str) -> str:
    """Return 8 hex digits that stand for a clip's sources and times, given as JSON."""
    return digest(source)[:8]


@lru_cache(maxsize=2)
def table_digests(table: ClipTable) -> np.ndarray:
    """Return what a receipt would record of every clip of a table, [N]."""
    return np.array([source_digest(json.dumps(sources)) for sources in table.slice_sources()])
