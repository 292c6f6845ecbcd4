"""Leases: who is making which shard, so that no two processes of any machine make the same one.

A lease is a file that only one can create, with a number that its owner raises by and by.  Whoever wants the shard
watches the number on a clock of his own, since clocks of two machines need not agree, and one that has stood still
for `LEASE_S` belongs to a dead owner; an owner of the same machine is dead as soon as its process is.  Taking over
creates the next generation of the lease, again as only one can; its owner, if alive after all, finds out.

A lease saves work and is no lock: what it guards is published whole, and is the same bytes whoever makes it.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from .errors import CacheError
from .places import is_local, names, read_bytes, storage_errors
from .publish import MACHINE, create, is_running, publish

BEAT_S = 10.0
LEASE_S = 60.0
POLL_S = 0.2


class Leases:
    """The leases of one process in one folder; used in a `with` block, which gives back what is still held."""

    def __init__(self, folder: Path, beat_s: float = BEAT_S, lease_s: float = LEASE_S) -> None:
        self.folder, self.beat_s, self.lease_s = folder, beat_s, lease_s
        self._owner, self._beats = uuid4().hex, count()
        self._held: dict[str, Path] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._heart is not None:
            self._heart.join()
        self.give_back_all()

    def take(self, name: str) -> bool:
        """Take a lease; False if another owner who seems to be alive has it.

        name: any path below the folder.  Raises CacheError if the folder cannot be written.
        """
        before = self._texts(name)
        last = max(before, default=None, key=_number)
        if last is not None and not self._is_dead(name, before[last]):
            return False
        mine = self.folder / f"{name}.{0 if last is None else _number(last) + 1}"
        over = None if last is None else _parsed(before[last]).get("owner")
        if not create(mine, self._text(over)):
            return False
        after = self._texts(name)
        if after.pop(mine, None) is None or after.items() - before.items():
            # While this process slept, others took the lease over, gave it back and took it again; or it is not dead.
            _unlink(mine)
            return False
        for dead in before:
            _unlink(dead)
        with self._lock:
            self._held[name] = mine
            if self._heart is None:
                heart = threading.Thread(target=self._beat, name="leases", daemon=True)
                heart.start()
                self._heart = heart
        return True

    def is_held(self, name: str) -> bool:
        """Say whether this process still has a lease that it took: nobody has taken it for dead meanwhile."""
        mine = self._held.get(name)
        # A later generation made over another owner is of a process that slept before it took, and retreats.
        return mine is not None and self._is_mine(mine) and self._owner not in map(_over, self._texts(name).values())

    def give_back(self, name: str) -> None:
        """Let others have a lease."""
        with self._lock:
            mine = self._held.pop(name, None)
            if mine is not None and self._is_mine(mine):
                _unlink(mine)

    def give_back_all(self) -> None:
        """Let others have every lease that is still held."""
        for name in list(self._held):
            self.give_back(name)

    def sweep(self) -> None:
        """Remove the leases of owners that have died, as far as the folder can be written."""
        for top, _, files in os.walk(self.folder) if is_local(self.folder) else ():
            for name in {file.rpartition(".")[0] for file in files if not file.startswith(".")}:
                lease = (Path(top) / name).relative_to(self.folder).as_posix()
                with suppress(CacheError):
                    if self.take(lease):
                        self.give_back(lease)

    @contextmanager
    def waiting_for(self, name: str) -> Iterator[None]:
        """Hold a lease for the length of a block, once everyone before has given it back."""
        while not self.take(name):
            time.sleep(POLL_S)
        try:
            yield
        finally:
            self.give_back(name)

    def _generations(self, name: str) -> list[Path]:
        """Return the files of a lease, the one that counts last."""
        path = self.folder / name
        numbered = [found.rpartition(".") for found in names(path.parent)]
        numbers = sorted(int(number) for stem, _, number in numbered if stem == path.name and number.isdecimal())
        return [path.with_name(f"{path.name}.{number}") for number in numbers]

    def _texts(self, name: str) -> dict[Path, bytes]:
        """Return what the files of a lease say."""
        texts = {}
        for file in self._generations(name):
            with suppress(FileNotFoundError):  # given back just now
                texts[file] = read_bytes(file)
        return texts

    def _is_dead(self, name: str, text: bytes) -> bool:
        """Say whether a lease's owner has died: its process is gone, or its number has stood still for too long."""
        about = _parsed(text)
        if about.get("machine") == MACHINE and not is_running(about.get("pid", 0)):
            return True
        seen, since = self._seen.get(name, (None, 0.0))
        if seen != text:
            self._seen[name] = text, time.monotonic()
            return False
        return time.monotonic() - since > self.lease_s

    def _is_mine(self, file: Path) -> bool:
        with suppress(*storage_errors()):
            return _parsed(read_bytes(file)).get("owner") == self._owner
        return False

    def _text(self, over: str | None) -> bytes:
        """Return what to write: never the same twice, so that a lease taken again is not taken for one at rest."""
        about = {"owner": self._owner, "over": over, "machine": MACHINE, "pid": os.getpid(), "beat": next(self._beats)}
        return json.dumps(about).encode()

    def _beat(self) -> None:
        """Raise the number of every lease held, for as long as there are any."""
        while not self._closing.wait(self.beat_s):
            for name, mine in list(self._held.items()):
                # A full disk, or a store that does not answer: if it lasts, publishing says so.
                with self._lock, suppress(*storage_errors()):
                    if name in self._held and self._is_mine(mine):
                        publish(mine, self._text(_over(read_bytes(mine))))


def _number(file: Path) -> int:
    return int(file.suffix[1:])


def _parsed(text: bytes) -> dict[str, Any]:
    """Return what a lease says; nothing if it was not written to its end."""
    try:
        about = json.loads(text)
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _over(text: bytes) -> str | None:
    """Return the dead owner in whose place a lease was taken, if any."""
    return _parsed(text).get("over")


def _unlink(file: Path) -> None:
    with suppress(*storage_errors()):  # a disk that is read-only by now: found dead in good time
        file.unlink(missing_ok=True)
