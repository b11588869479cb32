"""Finds out whose client has gone: Triton has to be asked, request by request."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from pagedcore_triton.responses import EngineControl, ResponseStream

logger = logging.getLogger(__name__)

# Asking takes a round trip of about 0.05 ms on the channel that the senders use, so many open requests are asked less often
# than few, and a handful at a time. Up to MAX_ROUND_SECONDS * MAX_POLLS_PER_SECOND of them, each is asked within 30 ms.
MIN_ROUND_SECONDS, MAX_ROUND_SECONDS = 0.02, 0.03
SECONDS_PER_STREAM = 0.002
MAX_POLLS_PER_SECOND = 8600
GROUP = 16


def round_seconds(num_streams: int) -> float:
    """The time in which each of so many open requests is asked once."""
    return max(
        MIN_ROUND_SECONDS, min(MAX_ROUND_SECONDS, SECONDS_PER_STREAM * num_streams), num_streams / MAX_POLLS_PER_SECOND
    )


class CancellationPoller:
    """A thread that asks for every open request in turn, queued or running, whether it was cancelled, and has it aborted."""

    def __init__(self, engine: EngineControl, discard: Callable[[ResponseStream], None]) -> None:
        """`discard` is told of the streams that are closed."""
        self._engine = engine
        self._discard = discard
        self._streams: deque[ResponseStream] = deque()  # the one that has not been asked for longest comes first
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pagedcore-cancellation", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, stream: ResponseStream) -> None:
        """Ask for a stream until it is closed."""
        self._streams.append(stream)

    def stop(self, timeout: float) -> None:
        """End the thread; `timeout` in seconds."""
        self._stopping.set()
        self._thread.join(timeout)
        self._streams.clear()  # their channels are not to outlive Triton's stub

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            num_streams = len(self._streams)
            group = min(GROUP, num_streams)
            share = group / num_streams if num_streams else 1.0
            # A round that took longer is not made up for.
            due = max(time.monotonic(), due + round_seconds(num_streams) * share)
            if self._stopping.wait(due - time.monotonic()):
                return
            for _ in range(group):
                self._poll(self._streams.popleft())

    def _poll(self, stream: ResponseStream) -> None:
        try:
            if stream.is_cancelled():
                if not stream.cancelling:  # asked for until it ends: the engine may not have known the request yet
                    stream.cancelling = True
                    logger.info("[vllm] Cancelling the request (%s)", stream.request_id)
                self._engine.abort(stream.request_id)
        except Exception:
            if not stream.cannot_ask:
                stream.cannot_ask = True  # once is enough: it is asked for again soon, and may fail again
                logger.exception("request %s: cannot tell whether it was cancelled", stream.request_id)
        if stream.is_closed:
            self._discard(stream)
        else:
            self._streams.append(stream)
