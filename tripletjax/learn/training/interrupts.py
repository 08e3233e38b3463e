"""Signals that stop a training between steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and has, with its state saved, in all processes."""


class Interrupts:
    """Notes that the process was asked to stop; a second time stops it at once.

    Attributes:
        asked: whether it was, by SIGINT or SIGTERM.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Only the main thread is told of signals.
        if threading.current_thread() is threading.main_thread():
            numbers = signal.SIGINT, signal.SIGTERM
            self._before = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves signals to who had them before."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
