"""Ctrl-C reaches every process of a terminal's group; those that have a parent to end them should not hear of it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deaf_to_interrupt() -> Iterator[None]:
    """Have the processes and threads that start in this block, and all that these start, never see SIGINT.

    From their first instant on, which a handler of their own would miss while they load their libraries.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
