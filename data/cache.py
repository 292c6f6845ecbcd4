"""The cache folder: its own row order, the stores it holds, and the receipts that say which shards exist."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .annotations import ClipTable
from .config import digest
from .errors import CacheError, IncompleteCacheError, cause
from .leases import Leases
from .modality import MODALITIES, is_own
from .places import names, place, read_bytes, sizes, storage_errors
from .publish import publish, publish_json, read_json, read_json_files, sweep, withdraw
from .shards import is_receipt, shard_file, state_file

ROWS = "clips.parquet"
COLUMNS = ["clip_id", "sources", "labels"]


class Cache:
    """A cache in a folder or an object store: `clips.parquet`, `tokens/`, `logits/`, `receipts/`, `leases/`."""

    def __init__(self, path: Path | str) -> None:
        self.path = place(path)
        self._rows_file = self.path / ROWS
        self._read_rows()

    @classmethod
    def open(cls, path: Path | str) -> "Cache":
        """Open a cache that must be there already; raises CacheError if it is not."""
        if not has_cache(path):
            raise CacheError(f"{path}: no cache here. Run karmma extract --cache {path} first.")
        return cls(path)

    def _read_rows(self) -> None:
        try:
            source = pa.BufferReader(read_bytes(self._rows_file))
            held = pq.ParquetFile(source, page_checksum_verification=True).read(use_threads=False).to_pydict()
            if list(held) != COLUMNS:
                raise pa.ArrowInvalid(f"its columns are {', '.join(held)}, expected {', '.join(COLUMNS)}")
        except FileNotFoundError:
            held = {}
        except pa.ArrowInvalid as error:
            raise CacheError(
                f"{self._rows_file}: damaged: {error}. It names the cache's rows: restore it from a copy."
            ) from None
        except storage_errors() as error:  # a page that fails its checksum is an OSError too
            raise CacheError(
                f"{self._rows_file}: {cause(error)}. Choose a folder that can be read and written."
            ) from None
        self.clip_ids: list[str] = held.get("clip_id", [])
        self.sources: list[str] = held.get("sources", [])
        self.labels: list[str] = held.get("labels", [])
        self._row_of = {clip_id: row for row, clip_id in enumerate(self.clip_ids)}

    @property
    def n_clips(self) -> int:
        """Rows of the cache, clips that left the table included."""
        return len(self.clip_ids)

    def leases(self) -> Leases:
        """Return the leases of this process on shards of the cache; raises CacheError if it cannot be written."""
        return Leases(self.path / "leases")

    def sweep(self) -> None:
        """Remove what processes of this machine that were killed left: files half written, and leases."""
        sweep(self.path)
        with self.leases() as leases:
            leases.sweep()

    @contextmanager
    def planning(self) -> Iterator[Callable[[], bool]]:
        """Hold the one lease under which rows are added and arrays grow; yields what says whether it is still held."""
        with self.leases() as leases, leases.waiting_for("planner"):
            yield lambda: leases.is_held("planner")

    def add_clips(self, table: ClipTable) -> list[str]:
        """Give every clip of the table a row, new ones at the end; return what changed since the last snapshot.

        A clip whose source or times changed keeps its row; its shards are then found stale by their receipts.
        """
        return self.add_rows(*_remembered(table))

    def foresee_clips(self, table: ClipTable) -> None:
        """Do as `add_clips` in memory alone."""
        self._taken(*_remembered(table))

    def add_rows(self, clip_ids: list[str], sources: list[str], labels: list[str]) -> list[str]:
        """Do as `add_clips` for clips given as what the cache remembers of them."""
        said = self._taken(clip_ids, sources, labels)
        if said is None:
            return []
        is_written = False
        while not is_written:
            with self.planning() as is_held:  # and what others have added since is kept
                self._read_rows()
                said = self._taken(clip_ids, sources, labels)
                is_written = said is None or is_held()  # away for too long: another may be writing
                if said is not None and is_written:
                    self._write_rows()
        return said or []

    def _taken(self, clip_ids: list[str], sources: list[str], labels: list[str]) -> list[str] | None:
        """Take over rows; return what is to be said of clips that were there, None if all were, just so."""
        said, changed = [], False
        for clip_id, source, label in zip(clip_ids, sources, labels, strict=True):
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
            self.sources[row], self.labels[row] = source, label
        return said if said or changed else None

    def _write_rows(self) -> None:
        sink = pa.BufferOutputStream()
        columns = {"clip_id": self.clip_ids, "sources": self.sources, "labels": self.labels}
        pq.write_table(pa.table(columns), sink, write_page_checksum=True)
        publish(self._rows_file, sink.getvalue())

    def rows(self, clip_ids: Sequence[str] | np.ndarray) -> np.ndarray:
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
        files = sorted((self.path / "receipts" / "tokens" / modality).glob("*/identity.json"))
        # A name with a dot is what a killed process was removing.
        return {file.parent.name: read_json(file) for file in files if not file.parent.name.startswith(".")}

    def modalities(self) -> list[str]:
        """Return the modalities that tokens may be of: all that are known, and one's own that are here."""
        here = {*names(self.path / "tokens"), *names(self.path / "receipts" / "tokens")}
        return [*MODALITIES, *sorted(filter(is_own, here))]

    def store_names(self, modality: str) -> list[str]:
        """Return the digests of a modality that anything is there of: an identity, a receipt or a store."""
        stores = [name for name in names(self.path / "tokens" / modality) if name.endswith(".zarr")]
        found = {name.removesuffix(".zarr") for name in stores if (self.path / "tokens" / modality / name).is_dir()}
        for name in names(self.path / "receipts" / "tokens" / modality):
            folder = self.receipts(modality, name)
            if (folder / "identity.json").exists() or self.n_views(modality, name):
                found.add(name)
        return sorted(name for name in found if not name.startswith("."))

    def all_identities(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Return the identity of every token store, by (modality, digest)."""
        return {(m, name): fields for m in self.modalities() for name, fields in self.identities(m).items()}

    def write_identity(self, modality: str, name: str, fields: dict[str, Any]) -> None:
        """Record what a store's digest stands for."""
        publish_json(self.receipts(modality, name) / "identity.json", fields)

    def _receipt_file(self, modality: str, name: str, view: int, shard: int) -> Path:
        return self.receipts(modality, name) / f"view{view}" / f"{shard}.json"

    def receipt(self, modality: str, name: str, view: int, shard: int) -> dict[str, Any] | None:
        """Return the receipt of one shard; None if there is none or the shard's file is not of the size it names."""
        store = self.tokens_path(modality, name)
        try:
            found = read_json(self._receipt_file(modality, name, view, shard))
            state_file(store / "state", shard, view).stat()
            size = shard_file(store / "tokens", shard, view).stat().st_size
        except FileNotFoundError:
            return None
        except CacheError:  # no JSON
            return None
        return found if is_receipt(found) and size == found["bytes"] else None

    def write_receipt(self, modality: str, name: str, view: int, shard: int, receipt: dict[str, Any]) -> None:
        """Record that a shard is done; the last step of its making."""
        publish_json(self._receipt_file(modality, name, view, shard), receipt)

    def drop_receipt(self, modality: str, name: str, view: int, shard: int) -> None:
        """Declare that a shard does not exist; the first step of superseding it."""
        withdraw(self._receipt_file(modality, name, view, shard))

    def valid_receipts(self, modality: str, name: str, view: int) -> dict[int, dict[str, Any]]:
        """Return shard -> receipt of all shards of a view that exist, in order."""
        found = self.found_receipts(modality, name, view)
        there = sizes(self.tokens_path(modality, name)) if found else {}
        whole = {}
        for shard, receipt in found.items():
            tokens, state = shard_file(Path("tokens"), shard, view), state_file(Path("state"), shard, view)
            if receipt and state.as_posix() in there and there.get(tokens.as_posix()) == receipt["bytes"]:
                whole[shard] = receipt
        return whole

    def found_receipts(self, modality: str, name: str, view: int) -> dict[int, dict[str, Any] | None]:
        """Return shard -> receipt of a view, in order, of missing files too; None for a receipt that is damaged."""
        found = read_json_files(self.receipts(modality, name) / f"view{view}")
        ours = {int(stem): receipt for stem, receipt in found.items() if re.fullmatch("[0-9]+", stem)}
        return {shard: receipt if is_receipt(receipt) else None for shard, receipt in sorted(ours.items())}

    def n_views(self, modality: str, name: str) -> int:
        """Return in how many views a store has receipts."""
        views = [re.fullmatch("view([0-9]+)", found) for found in names(self.receipts(modality, name))]
        return max((int(view[1]) + 1 for view in views if view), default=0)

    def held(self, modality: str, name: str, view: int) -> np.ndarray:
        """Return for every row [N] the digest under which a view's shards hold it, '' where they do not."""
        return self.held_by(self.valid_receipts(modality, name, view).values())

    def held_by(self, receipts: Iterable[dict[str, Any]]) -> np.ndarray:
        """Do as `held` for a view whose receipts have been read."""
        out = np.full(self.n_clips, "", "<U8")
        for receipt in receipts:
            # Another process may have given the cache more rows since ours were read.
            part = out[receipt["first_row"] : receipt["first_row"] + len(receipt["rows"])]
            part[:] = receipt["rows"][: len(part)]
        return out

    def contents_digest(self, modality: str, name: str, n_views: int) -> str:
        """Return 16 hex digits over all tokens of a store, absent and failed clips included."""
        views = [self.valid_receipts(modality, name, view).values() for view in range(n_views)]
        return digest([[[receipt["sha256"], receipt["counts"]] for receipt in receipts] for receipts in views])

    def failures(self, modality: str, name: str, clip_ids: Iterable[str]) -> dict[str, str]:
        """Return clip id -> reason of every one of these clips that failed in any view of a store."""
        out: dict[str, str] = {}
        for view in range(self.n_views(modality, name)):
            for receipt in self.valid_receipts(modality, name, view).values():
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


def _remembered(table: ClipTable) -> tuple[list[str], list[str], list[str]]:  # ids, sources and times, labels
    return table.clip_ids.tolist(), [json.dumps(sources) for sources in table.slice_sources()], table.snapshot()


def has_cache(path: Path | str) -> bool:
    """Say whether a cache is there."""
    return (place(path) / ROWS).exists()


def source_digest(source: str) -> str:
    """Return 8 hex digits that stand for a clip's sources and times, given as JSON."""
    return digest(source)[:8]


@lru_cache(maxsize=2)
def table_digests(table: ClipTable) -> np.ndarray:
    """Return what a receipt would record of every clip of a table, [N]."""
    return np.array([source_digest(json.dumps(sources)) for sources in table.slice_sources()])
