"""The sending threads, on which open requests are spread."""

from __future__ import annotations

import threading
from queue import SimpleQueue

from pagedcore_triton.cancellation import CancellationPoller
from pagedcore_triton.responses import EngineControl, ResponseStream

# A send blocks for about 0.1 ms, without the interpreter lock. More lanes send little more, and then new requests and the
# engine wait for the lock behind them: with four, first tokens took ten times as long as with three (docs/gpu-status.md).
NUM_LANES = 3


class Lane:
    """A sending thread. Streams with something to send wait in line; those without a first response, and those with their last
    one, go first: that is what clients wait for, the one to show something, the other to go on."""

    def __init__(self, engine: EngineControl, name: str) -> None:
        self.num_streams = 0  # pinned to this lane and not closed
        self._engine = engine
        self._inbox: SimpleQueue[ResponseStream | None] = SimpleQueue()
        self._urgent: dict[ResponseStream, None] = {}  # in their order, as are the rest
        self._rest: dict[ResponseStream, None] = {}
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, stream: ResponseStream) -> None:
        """Put a stream that has something to send in line, or, if it is there, where it belongs by now."""
        self._inbox.put(stream)

    def stop(self, timeout: float) -> None:
        """Send what is in line, then end."""
        self._inbox.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            stream = self._next()
            if stream is None:
                return
            if stream.send_pending(merge=bool(self._urgent or self._rest), engine=self._engine):
                self._line_up(stream)

    def _next(self) -> ResponseStream | None:
        """The stream whose turn it is; None when the lane is to end."""
        inbox = self._inbox
        while not (inbox.empty() and (self._urgent or self._rest)):
            stream = inbox.get()
            if stream is None:
                inbox.put(None)  # for the next turn: what is in line goes first
                break
            self._line_up(stream)
        line = self._urgent or self._rest
        if not line:
            return None
        stream = next(iter(line))
        del line[stream]
        return stream

    def _line_up(self, stream: ResponseStream) -> None:
        if stream.is_closed or stream in self._urgent:
            return
        if stream.is_urgent:
            self._rest.pop(stream, None)
            self._urgent[stream] = None
        else:
            self._rest[stream] = None


class SenderPool:
    """The lanes, and the cancellation poller that asks for every open request.

    With `NUM_LANES` lanes, each request on one of them: an idle lane sends every token at once, a backlogged one merges
    the tokens that a request has piled up.
    """

    def __init__(self, engine: EngineControl) -> None:
        self._lanes = [Lane(engine, f"pagedcore-sender-{number}") for number in range(NUM_LANES)]
        self._lock = threading.Lock()  # guards _streams and the lanes' num_streams
        self._streams: set[ResponseStream] = set()
        self._poller = CancellationPoller(engine, self.discard)

    def start(self) -> None:
        for lane in self._lanes:
            lane.start()
        self._poller.start()

    def add(self, stream: ResponseStream) -> None:
        """Pin a stream to the lane with the fewest, before its request goes to the engine."""
        with self._lock:
            stream.lane = min(self._lanes, key=lambda lane: lane.num_streams)
            stream.lane.num_streams += 1
            self._streams.add(stream)
        self._poller.add(stream)

    def discard(self, stream: ResponseStream) -> None:
        """Forget a stream whose request the engine did not take, or that is closed."""
        with self._lock:
            if stream in self._streams:
                self._streams.remove(stream)
                assert stream.lane is not None
                stream.lane.num_streams -= 1

    def stop(self, timeout: float) -> None:
        """Send what the engine has pushed so far, and end the threads; `timeout` in seconds, for each."""
        for lane in self._lanes:
            lane.stop(timeout)
        self._poller.stop(timeout)
        with self._lock:
            self._streams.clear()  # their channels are not to outlive Triton's stub
