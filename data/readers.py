"""Reader processes: raw clips read side by side, where a codec library that crashes fails its clip and not the run."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np

from .annotations import Clip
from .config import DataConfig
from .errors import ConfigError, InstallationError
from .media import Reading
from .modality import FAILED
from .reader import fill, receive, send

logger = logging.getLogger(__name__)
# Seconds that a clip may take: far more than any needs, RAFT on a slow processor included.
PATIENCE_S = 120.0

# A clip, the index of its view, and the modalities to read.
Order = tuple[Clip, int, tuple[str, ...]]
Readings = dict[str, Reading]  # by modality


class _LostError(Exception):
    """A reader process has ended while it was at work; `late`: because it took too long, `killed`: by someone."""

    def __init__(self, code: int) -> None:
        self.late, self.killed = code == -signal.SIGALRM, code == -signal.SIGKILL
        super().__init__(f"signal {-code}" if code < 0 else f"exit code {code}")
        if -code in set(signal.Signals):
            super().__init__(signal.Signals(-code).name)


class ReaderPool:
    """Reads clips in at most `n_readers` processes, each started when first needed; used in a `with` block.

    May be handed to a process made by fork, which then starts readers of its own.
    """

    def __init__(self, n_readers: int, data: DataConfig, patience_s: float = PATIENCE_S) -> None:
        self.n_readers, self.data, self.patience_s = n_readers, data, patience_s
        self._readers: list[_Reader] = []
        self._begin()

    def _begin(self) -> None:
        """Start from nothing: locks, threads and readers belong to the process that made them."""
        for reader in self._readers:
            reader.disown()
        self._pid, self._lock, self._closing = os.getpid(), threading.Lock(), False
        self._readers = []
        self._idle: list[_Reader] = []
        self._threads = ThreadPoolExecutor(self.n_readers, "reader")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the readers at once, without zombies; what is not read by then is cancelled."""
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            self._closing = True
            for reader in self._readers:
                reader.process.kill()  # wakes the thread that waits for its answer
        self._threads.shutdown(cancel_futures=True)
        for reader in self._readers:
            reader.end()
        self._readers, self._idle = [], []

    def submit(self, orders: Sequence[Order]) -> list[Future[Readings]]:
        """Ask for clips; those of one video are read together.  Returns one future for each, in order.

        What cannot be read is a FAILED reading.  A future raises InstallationError if a library does not load,
        RuntimeError with the reader's traceback for a bug, and CancelledError if the pool was closed before.
        """
        if self._pid != os.getpid():
            self._begin()
        futures: list[Future[Readings]] = [Future() for _ in orders]
        videos: dict[tuple[Path, float | None], list[int]] = {}
        for at, (clip, _, _) in enumerate(orders):
            videos.setdefault((clip.video, clip.rates.get("video")), []).append(at)
        for places in videos.values():
            task = self._threads.submit(self._read, [orders[at] for at in places])
            task.add_done_callback(partial(_hand_out, [futures[at] for at in places]))
        return futures

    def _read(self, orders: list[Order]) -> list[dict[str, Reading]]:
        """Read clips of one video; if that ends the reader, find out which clip and modality did it."""
        try:
            return self._ask(orders)
        except _LostError as lost:
            logger.warning("%s: a reader process ended (%s); trying one by one", orders[0][0].video, lost)
            by_clip = len(orders) > 1 and not lost.late
        return [self._read_apart(*order, by_clip) for order in orders]

    def _read_apart(self, clip: Clip, view: int, names: tuple[str, ...], by_clip: bool) -> dict[str, Reading]:
        """Read one clip, all modalities together if `by_clip`, and one by one if that fails."""
        if by_clip:
            try:
                return self._ask([(clip, view, names)])[0]
            except _LostError:
                pass
        return {name: self._read_alone(clip, view, name) for name in names}

    def _read_alone(self, clip: Clip, view: int, name: str) -> Reading:
        try:
            return self._ask([(clip, view, (name,))])[0][name]
        except _LostError as lost:
            end = f"did not end within {self.patience_s:g} s" if lost.late else f"ended the reader process ({lost})"
            memory = ", or use fewer readers if memory was short" if lost.killed else ""
            path = clip.sources.get(name) or clip.video
            return Reading(FAILED, None, f"{path}: reading {name} {end}. Fetch the file again or convert it{memory}.")

    def _ask(self, orders: list[Order]) -> list[dict[str, Reading]]:
        """Have one reader read; raises _LostError if it ends."""
        reader, found = self._take(), None
        try:
            if not reader.is_ready:
                reader.start(self.data, self.patience_s)
            found = reader.ask(orders)
        except (EOFError, BrokenPipeError):
            lost = _LostError(reader.process.wait())
        finally:  # after an error there is no telling what is still in the pipe
            self._give_back(reader, fit=found is not None)
        if found is not None:
            return found
        if self._closing:
            raise CancelledError
        if not reader.is_ready and not lost.killed:
            raise InstallationError(
                f"A reader process ended as it loaded its libraries ({lost}). Install karmma and what it depends on "
                f"anew into {sys.prefix}; `{sys.executable} -c 'import av, cv2'` should say nothing."
            )
        raise lost

    def _take(self) -> "_Reader":
        with self._lock:
            if self._closing:
                raise CancelledError
            if not self._idle:
                self._readers.append(_Reader())
                return self._readers[-1]
            reader = self._idle.pop()
        if reader.process.poll() is None:
            return reader
        self._give_back(reader, fit=False)
        return self._take()

    def _give_back(self, reader: "_Reader", fit: bool) -> None:
        with self._lock:
            (self._idle.append if fit else self._readers.remove)(reader)
        if not fit:
            reader.end()


class _Reader:
    """One reader process, and the pipes to it."""

    def __init__(self) -> None:
        self.is_ready = False
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.reader"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # It finds the packages that this process finds, and works in one thread: there are others like it.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            process_group=0,  # out of the reach of the terminal's Ctrl-C and Ctrl-Z
        )
        asked, answers = self.process.stdin, self.process.stdout
        assert isinstance(asked, FileIO)  # as nothing is buffered
        assert isinstance(answers, FileIO)
        self._asked, self._answers = asked, answers

    def start(self, data: DataConfig, patience_s: float) -> None:
        """Hand over the settings and wait until the libraries are loaded."""
        send(self._asked, {"data": data.model_dump(mode="json"), "patience_s": patience_s})
        self._receive()
        self.is_ready = True

    def ask(self, orders: list[Order]) -> list[dict[str, Reading]]:
        """Return the readings of clips of one video; raises EOFError or BrokenPipeError if the process has ended."""
        clips, views, modalities = zip(*orders, strict=True)
        request = {"clips": [*map(_row, clips)], "views": [*map(int, views)], "modalities": modalities}
        send(self._asked, request)
        return [{name: self._reading(*said) for name, *said in readings} for readings in self._receive()["readings"]]

    def _receive(self) -> dict[str, Any]:
        answer = receive(self._answers)
        if "missing" in answer:
            raise InstallationError(answer["missing"])
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        if "bug" in answer:
            raise RuntimeError(f"a reader process met a bug:\n{answer['bug']}")
        return answer

    def _reading(self, state: int, reason: str, dtype: str = "", shape: Sequence[int] = ()) -> Reading:
        if not dtype:
            return Reading(state, None, reason)
        array = np.empty(shape, dtype)
        fill(self._answers, array.reshape(-1).view(np.uint8))
        return Reading(state, array, reason)

    def end(self) -> None:
        """End the process, if it has not ended by itself, and close the pipes."""
        self.process.kill()
        self.process.wait()
        self._asked.close()
        self._answers.close()

    def disown(self) -> None:
        """Let go of a process that is another one's child."""
        self._asked.close()
        self._answers.close()
        self.process.returncode = 0  # else Popen waits for it


def _row(clip: Clip) -> dict[str, Any]:
    sources = {name: path and str(path) for name, path in clip.sources.items()}
    return vars(clip) | {"video": str(clip.video), "sources": sources, "rates": dict(clip.rates)}


def _hand_out(futures: list[Future[Readings]], task: Future[list[Readings]]) -> None:
    """Give each clip of a group its readings, or the group's error."""
    error = CancelledError() if task.cancelled() else task.exception()
    for at, future in enumerate(futures):
        if future.set_running_or_notify_cancel():
            future.set_exception(error) if error else future.set_result(task.result()[at])
