"""Signals that stop a training between steps, or after a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(KeyboardInterrupt):
    """Training stopped after a signal, with its state saved, in all processes."""


class Interrupts:
    """Handler of SIGINT and SIGTERM that lets a step finish.

    A second signal raises KeyboardInterrupt at once.

    Args:
        signals: the signals, instead of these two.

    Attributes:
        received: whether a signal came.
    """

    def __init__(self, *signals: int) -> None:
        self.received = False
        self._signals = signals or (signal.SIGINT, signal.SIGTERM)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Python delivers signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in self._signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Give signals back to their previous handlers for a while."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _note(self, number: int, frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Deliver SIGINT at the end of the body; a second one raises KeyboardInterrupt.

    Orbax (0.12.8) awaits in its own event loop, which drops a KeyboardInterrupt or
    turns it into an error of the checkpoint.
    """
    interrupts = Interrupts(signal.SIGINT)
    try:
        with interrupts:
            yield
    finally:
        if interrupts.received:
            signal.raise_signal(signal.SIGINT)
