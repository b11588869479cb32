"""What ends a model from outside Triton's calls: a signal to its process, and the death of its engine."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable

from pagedcore.engine.engine_thread import EngineThread

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 5.0
_PERIOD_SECONDS = 0.2  # between two looks at the engine


class Lifecycle:
    """A thread that ends every open request before the server does, where Triton would only cut the connections.

    On SIGINT or SIGTERM the engine is drained. Triton waits for open requests at that time, but it tells its models nothing,
    and after `--exit-timeout-secs` it exits without a word to the clients.

    When the engine has died, this process ends, once every client has its answer: Triton 2.51 asks no model whether it is
    ready, but whoever runs the server sees a process that is gone.
    """

    def __init__(self, engine: EngineThread, flush: Callable[[float], None], drain_seconds: float) -> None:
        """`flush` sends what the engine has pushed, within a time in seconds; open requests may go on for `drain_seconds`
        after a signal."""
        self._engine = engine
        self._flush = flush
        self._drain_seconds = drain_seconds
        self._reader, self._writer = socket.socketpair()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pagedcore-lifecycle", daemon=True)

    def start(self) -> None:
        """Take over SIGINT and SIGTERM, which the stub ignores. Called on the main thread, as Python demands."""
        self._writer.setblocking(False)
        # The main thread mostly waits in C++, where no Python handler runs; the wake-up byte is written all the same.
        signal.set_wakeup_fd(self._writer.fileno())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda _number, _frame: None)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread, `timeout` in seconds; signals are ignored from now on. Called on the main thread."""
        self._stopping.set()
        signal.set_wakeup_fd(-1)
        self._thread.join(timeout)
        self._reader.close()
        self._writer.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            signalled, _, _ = select.select([self._reader], [], [], _PERIOD_SECONDS)
            if signalled:
                logger.info("draining: open requests may go on for %g s", self._drain_seconds)
                self._engine.drain(self._drain_seconds)
                return
            failure = self._engine.failure
            if failure is not None:
                cause = "" if failure.__cause__ is None else f": {failure.__cause__!r}"
                logger.critical("its engine has died: %s%s", failure, cause)
                self._flush(_FLUSH_SECONDS)
                os._exit(1)  # nothing of the engine can be trusted to end in an orderly way
