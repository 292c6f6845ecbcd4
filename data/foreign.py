"""HDF5 files of features and logits: how they look, and what of them belongs to a clip table.

    /clip_id             [N] text
    /tokens/<modality>   [N, V, k, D], [N, k, D] or [N, D], any float; a row that is NaN is absent
    /state/<modality>    [N, V] or [N] uint8: 0 not there, 1 present, 2 absent, 3 failed; may be left out
    /logits/<head>       [N, V, classes] or [N, classes], any float; a row that is NaN is not there
    /classes/<head>      [classes] text; may be left out if the classes are those of the table, in its order

What this package exports also says, as attributes of a modality or of /logits, what the values were made from, and a
checksum over clips, states and tokens, so that importing it gives the same store again.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .annotations import ClipTable
from .errors import CacheError, ConfigError, MediaError
from .modality import in_order
from .packs import intact, member

if TYPE_CHECKING:
    import h5py

# Bytes of tokens that are held in memory at once.
PIECE_BYTES = 2**26


class ForeignFile:
    """An HDF5 file of tokens and logits; its clips are joined to a table by id."""

    def __init__(self, path: Path, file: "h5py.File", table: ClipTable) -> None:
        self.path, self.file, self.table = path, file, table
        row_of = {clip_id: row for row, clip_id in enumerate(table.clip_ids.tolist())}
        ids = texts(self.dataset("clip_id"))
        if len(set(ids)) < len(ids):
            raise CacheError(f"{path}: clip_id names {len(ids) - len(set(ids))} clip(s) twice. Keep one row of each.")
        self.rows = np.array([row_of.get(clip_id, -1) for clip_id in ids], np.int64)  # of the table; -1 unknown
        if not (self.rows >= 0).any():
            raise CacheError(f"{path}: none of its {len(ids)} clips is in {table.path}. Name the table it belongs to.")

    def dataset(self, name: str) -> Any:
        """Return a member of the file by its path; raises CacheError if it is not there or leads out of the file."""
        import h5py

        found: Any = self.file
        for part in name.split("/"):
            found = member(self.path, found, part)
        if not isinstance(found, h5py.Dataset):
            raise CacheError(f"{self.path}: {name} is a group, expected a dataset. docs/cache.md says how it looks.")
        return found

    def group(self, name: str) -> Any:
        """Return a group at the top of the file; raises CacheError if it is a dataset or a link."""
        import h5py

        found = member(self.path, self.file, name)
        if not isinstance(found, h5py.Group):
            raise CacheError(f"{self.path}: {name} is a dataset, expected a group. docs/cache.md says how it looks.")
        return found

    @property
    def modalities(self) -> list[str]:
        """Modalities that the file has tokens of; raises CacheError if it has neither tokens nor logits."""
        if "tokens" not in self.file and not self.has_logits:
            raise CacheError(f"{self.path}: neither tokens nor logits in it. docs/cache.md says how such a file looks.")
        names = list(self.group("tokens")) if "tokens" in self.file else []
        try:
            return list(in_order(names)) if names else []
        except ConfigError as error:
            raise CacheError(f"{self.path}: tokens: {error} A modality of your own is called own_NAME.") from None

    @property
    def has_logits(self) -> bool:
        """Whether the file has a teacher's logits."""
        return "logits" in self.file

    @property
    def n_unknown(self) -> int:
        """Clips of the file that the table does not have."""
        return int((self.rows < 0).sum())


@contextmanager
def open_foreign(path: Path, table: ClipTable) -> Iterator[ForeignFile]:
    """Open a file of features for the clips of a table; raises CacheError if it is damaged or of another form."""
    import h5py

    try:
        with intact(path), h5py.File(path, "r") as file:
            yield ForeignFile(path, file, table)
    except MediaError as error:
        raise CacheError(str(error)) from None


def tokens_checksum(file: "h5py.File", modality: str) -> str:
    """Return the SHA-256 of a modality's clip ids, states and tokens, these read piece by piece."""
    dataset, found = file[f"tokens/{modality}"], hashlib.sha256()
    found.update(str(dataset.attrs.get("identity", "")).encode())
    found.update(json.dumps(texts(file["clip_id"])).encode())
    if f"state/{modality}" in file:
        found.update(np.ascontiguousarray(file[f"state/{modality}"][:], np.uint8))
    step = max(1, PIECE_BYTES // max(1, dataset[:1].nbytes))
    for at in range(0, len(dataset), step):
        found.update(np.ascontiguousarray(dataset[at : at + step]))
    return found.hexdigest()


def logits_checksum(file: "h5py.File") -> str:
    """Return the SHA-256 of clip ids, logits, classes, and what is said of where the logits come from."""
    found = hashlib.sha256(str(file["logits"].attrs.get("about", "")).encode())
    found.update(json.dumps(texts(file["clip_id"])).encode())
    for head in sorted(file["logits"]):
        found.update(np.ascontiguousarray(file[f"logits/{head}"][:]))
        if f"classes/{head}" in file:
            found.update(json.dumps(texts(file[f"classes/{head}"])).encode())
    return found.hexdigest()


def texts(dataset: "h5py.Dataset") -> list[str]:
    """Return the texts of a dataset, which may come as bytes."""
    return [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]]
