"""Who may use the interpreter: the engine thread first, while it has work of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# No other thread waits longer, so that none starves where the engine never has to wait for its device.
_MAX_WAIT_SECONDS = 0.002


class HostTurn:
    """Keeps threads that can wait out of the engine thread's way between two waits for the device.

    An engine thread that plans and launches a step gives the interpreter lock up in every call that enqueues something, and
    would wait for it each time behind the threads that send responses, while the device runs dry. So those ask here first,
    and go on when the engine has to wait for the device anyway.
    """

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()

    def begin(self) -> None:
        """The engine thread has work of its own from now on."""
        self._open.clear()

    def end(self) -> None:
        """The engine thread has nothing to do."""
        self._open.set()

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        """While the engine thread waits for its device."""
        self._open.set()
        try:
            yield
        finally:
            self._open.clear()

    def wait(self) -> None:
        """Let the engine thread go first, for a while at most. For all other threads."""
        self._open.wait(_MAX_WAIT_SECONDS)
