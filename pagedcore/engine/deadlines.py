"""Requests that have to be answered by a point in time, whatever the engine is doing then."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pagedcore.engine.clock import Clock

_MAX_STALE = 64  # entries of requests that have ended, beyond as many as there are live ones


@dataclass(frozen=True)
class Deadline:
    """`timeout`: seconds, above 0, from `begin` on, a reading of the engine's clock."""

    timeout: float
    begin: float

    @property
    def at(self) -> float:
        return self.begin + self.timeout


class DeadlineTimer:
    """A thread that calls `expire` with each watched request's id and deadline when that has passed.

    It is a thread of its own so that an engine that hangs in a step does not hide a deadline. Any thread may watch and
    forget; a request that is forgotten while its deadline passes may still expire.
    """

    def __init__(self, expire: Callable[[str, Deadline], None], clock: Clock = time.monotonic) -> None:
        self._expire = expire
        self._clock = clock
        self._changed = threading.Condition()  # guards what follows
        self._live: dict[str, Deadline] = {}
        self._heap: list[tuple[float, str]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pagedcore-deadlines", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; nothing expires from now on."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def watch(self, request_id: str, deadline: Deadline) -> None:
        with self._changed:
            self._live[request_id] = deadline
            heapq.heappush(self._heap, (deadline.at, request_id))
            if self._heap[0][1] == request_id:
                self._changed.notify()

    def forget(self, request_id: str) -> None:
        """Stop watching a request, if it is watched."""
        with self._changed:
            if self._live.pop(request_id, None) is None:
                return
            if len(self._heap) > 2 * len(self._live) + _MAX_STALE:
                self._heap = [(deadline.at, live) for live, deadline in self._live.items()]
                heapq.heapify(self._heap)

    def expire_due(self) -> None:
        """Call `expire` for every request whose deadline has passed, on the caller's thread."""
        while True:
            with self._changed:
                expired = self._pop_due()
            if expired is None:
                return
            self._expire(*expired)

    def _run(self) -> None:
        while (expired := self._next()) is not None:
            self._expire(*expired)

    def _next(self) -> tuple[str, Deadline] | None:
        """Wait for the next request to expire; None when the thread is to end."""
        with self._changed:
            while not self._stopping:
                if (expired := self._pop_due()) is not None:
                    return expired
                left = self._heap[0][0] - self._clock() if self._heap else threading.TIMEOUT_MAX
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            return None

    def _pop_due(self) -> tuple[str, Deadline] | None:
        """Take out the first request if its deadline has passed. The caller holds the lock."""
        while self._heap:
            at, request_id = self._heap[0]
            deadline = self._live.get(request_id)
            if deadline is not None and deadline.at == at:
                if at > self._clock():
                    return None
                heapq.heappop(self._heap)
                return request_id, self._live.pop(request_id)
            heapq.heappop(self._heap)  # the request has ended
        return None
