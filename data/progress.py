"""What people watch while long work runs: a bar with rate and time left on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0
# Of the ranks that torchrun starts, the first speaks for all.
IS_SILENT = os.environ.get("RANK", "0") != "0"


def silence() -> None:
    """Show no progress in this process: another one speaks for it."""
    global IS_SILENT
    IS_SILENT = True


class Task:
    """One piece of long work with a known total; `advance` is all that its worker calls."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self.start = 0, time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units as done; `note` is shown beside them (a loss, say)."""
        self.done += n

    def rate(self) -> float:
        """Return units per second since the start."""
        return self.done / max(time.monotonic() - self.start, 1e-9)

    def pace(self, unit: str = "") -> str:
        """Return the rate as text, units per second; for what takes longer than a second, seconds for one."""
        rate = self.rate()
        return f"{1 / rate:.1f} s each" if 0 < rate < 1 else f"{rate:.1f}{unit}/s"


class _Bar(Task):
    def __init__(self, name: str, total: int, unit: str, bars: Progress) -> None:
        super().__init__(name, total, unit)
        self._bars, self._id = bars, bars.add_task(name, total=total, rate="", note="")

    def advance(self, n: int = 1, note: str = "") -> None:
        super().advance(n)
        rate = self.pace(f" {self.unit}")
        self._bars.update(self._id, advance=n, rate=rate, note=note or self._bars.tasks[self._id].fields["note"])


class _Lines(Task):
    def __init__(self, name: str, total: int, unit: str) -> None:
        super().__init__(name, total, unit)
        self._said = self.start

    def advance(self, n: int = 1, note: str = "") -> None:
        super().advance(n)
        now = time.monotonic()
        if now - self._said < LINE_EVERY_S and self.done < self.total:
            return
        self._said = now
        left = f"{(self.total - self.done) / self.rate():.0f} s left" if self.done else "no rate yet"
        text = f"{self.name}: {self.done}/{self.total} {self.unit}, {self.pace()}, {left}"
        sys.stderr.write(f"{text}  {note}".rstrip() + "\n")


@contextmanager
def watched(name: str, total: int, unit: str) -> Iterator[Task]:
    """Show the progress of a block on stderr: a rich bar on a terminal, a plain line every few seconds otherwise."""
    if IS_SILENT:
        yield Task(name, total, unit)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(name, total, unit)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as bars:
        yield _Bar(name, total, unit, bars)
