"""The requests that have been taken and not ended, each with the sink that hears of it."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from pagedcore.engine.outputs import OutputSink, TokenOutput
from pagedcore.engine.sequence import FinishReason
from pagedcore.errors import RequestError


class OpenRequests:
    """Sees to it that every sink gets exactly one output with `request_finished`, and nothing after it. Thread-safe.

    Sinks are called under the lock, so that a request's outputs arrive in order whichever thread ends it. They may come back
    here. Who calls with another lock held that a sink needs would wait for ever.

    The id of a request that has expired stays in use until it is released: what the engine still says of that request must
    not reach another one.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._sinks: dict[str, OutputSink] = {}
        self._expired: set[str] = set()  # ids of requests that the engine may still have

    def __len__(self) -> int:
        return len(self._sinks)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sinks

    def add(self, request_id: str, sink: OutputSink) -> None:
        """Raises RequestError if the id is in use."""
        with self._lock:
            if request_id in self._sinks or request_id in self._expired:
                raise RequestError(f"request_id {request_id!r} is in use by an unfinished request")
            self._sinks[request_id] = sink

    def discard(self, request_id: str) -> bool:
        """Forget a request without a word to its sink; False if it has ended already."""
        with self._lock:
            return self._sinks.pop(request_id, None) is not None

    def deliver(self, outputs: Iterable[TokenOutput]) -> None:
        """Hand outputs to their requests' sinks; those of requests that have ended are dropped."""
        with self._lock:
            for output in outputs:
                take = self._sinks.pop if output.request_finished else self._sinks.get
                sink = take(output.request_id, None)
                if sink is not None:
                    sink.push(output)

    def fail(self, request_id: str, error: Exception) -> bool:
        """End a request with an error; False if it has ended already."""
        with self._lock:
            sink = self._sinks.pop(request_id, None)
            if sink is not None:
                sink.push(_error_output(request_id, error))
            return sink is not None

    def expire(self, request_id: str, error: Exception) -> bool:
        """As `fail`, for a request that the engine may still have; its id is in use until `release`."""
        with self._lock:
            is_open = self.fail(request_id, error)
            if is_open:
                self._expired.add(request_id)
            return is_open

    def release(self, request_id: str) -> None:
        """Free the id of a request that has expired: the engine does not have it any more."""
        with self._lock:
            self._expired.discard(request_id)

    def fail_all(self, error: Exception) -> None:
        """End every request with an error."""
        with self._lock:
            while self._sinks:
                request_id, sink = self._sinks.popitem()
                sink.push(_error_output(request_id, error))


def _error_output(request_id: str, error: Exception) -> TokenOutput:
    return TokenOutput(request_id, 0, [], FinishReason.ERROR, error=error, request_finished=True)
