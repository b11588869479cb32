"""From the engine's tokens to responses: one ResponseStream per request, a few sending threads for all of them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Protocol

from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import FinishReason
from pagedcore.errors import EngineDeadError, NonFiniteLogitsError, RequestError
from pagedcore.text import OutputText
from pagedcore_triton.protocol import OutputDelta

logger = logging.getLogger(__name__)

NUM_LANES = 4  # a send blocks for about 0.1 ms; the process boundary saturates at about four senders
# Asking whether a request was cancelled takes a round trip of about 0.05 ms on the channel that the senders use, so many
# open requests are asked less often than few, and a handful at a time.
POLL_SECONDS_PER_STREAM = 0.002
MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.02, 0.1
POLL_GROUP = 8
GENERATION_ERROR = "Error generating stream: "


class ErrorCode(Enum):
    """The Triton error codes in use."""

    INVALID_ARG = "INVALID_ARG"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"
    CANCELLED = "CANCELLED"


class Channel(Protocol):
    """The way back to one request's client. Nothing may be called after a final send."""

    def send(self, delta: OutputDelta, final: bool) -> None: ...

    def send_error(self, code: ErrorCode, message: str) -> None:
        """Send an error, which is final."""
        ...

    def is_cancelled(self) -> bool: ...


class Aborter(Protocol):
    """The part of the engine that a response needs."""

    def abort(self, request_id: str) -> None: ...


def error_of(error: Exception) -> tuple[ErrorCode, str]:
    """What to tell a client about an error. Only the project's own errors are worded for clients."""
    if isinstance(error, RequestError):
        return ErrorCode.INVALID_ARG, GENERATION_ERROR + str(error)
    if isinstance(error, EngineDeadError):
        return ErrorCode.UNAVAILABLE, GENERATION_ERROR + str(error)
    if isinstance(error, NonFiniteLogitsError):
        return ErrorCode.INTERNAL, GENERATION_ERROR + str(error)
    return ErrorCode.INTERNAL, f"{GENERATION_ERROR}internal error ({type(error).__name__}), see the server's log"


class ResponseStream:
    """One request's responses. It sees to it that exactly one of them is final, whatever happens.

    `push` belongs to the engine thread and `send_pending` to the lane that the stream is pinned to; any thread may ask
    whether it is cancelled or closed.
    """

    def __init__(
        self, request_id: str, channel: Channel, text: OutputText, params: SamplingParams, *, stream: bool, prefix: str
    ) -> None:
        """`prefix` goes before the text of a request that does not stream."""
        self.request_id = request_id
        self.lane: Lane | None = None
        self.started = False  # the first response has been sent
        self._channel = channel
        self._text = text
        self._hides_stop_token = not params.include_stop_str_in_output
        self._stream = stream
        self._sends_at_once = stream or bool(params.stop)
        self._unsent = prefix
        self._pending: deque[TokenOutput] = deque()
        self._in_line = False  # at most once, so that a lane with one stream in line knows that it is idle otherwise
        self._lining_up = threading.Lock()
        self._closed = False
        self._closing = threading.Lock()  # nobody may ask the channel anything once the final send has begun

    @property
    def is_closed(self) -> bool:
        return self._closed

    def push(self, output: TokenOutput) -> None:
        """Take an output from the engine; returns at once."""
        assert self.lane is not None
        with self._lining_up:
            self._pending.append(output)
            if self._in_line or not (self._sends_at_once or output.finish_reason is not None):
                return
            self._in_line = True
        self.lane.put(self)

    def refuse(self, error: Exception) -> None:
        """Answer a request that the engine did not take. Nothing has been or will be pushed."""
        self._fail(*error_of(error))

    def is_cancelled(self) -> bool:
        """True if the client has gone and does not know the end yet."""
        with self._closing:
            return not self._closed and self._channel.is_cancelled()

    def send_pending(self, merge: bool, engine: Aborter) -> bool:
        """Send what the engine has pushed, as one response if `merge`, else its first output only.

        Returns whether anything is left, so that the stream has to line up again. An error in here ends the request, not
        the lane.
        """
        try:
            self._send_next(merge, engine)
        except Exception as error:
            logger.exception("request %s: a response could not be sent", self.request_id)
            engine.abort(self.request_id)
            self._fail(*error_of(error))
        with self._lining_up:
            if self._closed:
                self._pending.clear()
            self._in_line = bool(self._pending)
            return self._in_line

    def _send_next(self, merge: bool, engine: Aborter) -> None:
        if self._closed or not self._pending:
            return
        output = self._pending.popleft()
        token_ids = list(output.token_ids)
        while self._pending and (merge or not self._stream) and output.finish_reason is None:
            output = self._pending.popleft()
            token_ids += output.token_ids
        reason = output.finish_reason
        if reason is FinishReason.ERROR:
            assert output.error is not None
            logger.error("request %s failed: %r", self.request_id, output.error)
            self._fail(*error_of(output.error))
        elif reason is FinishReason.ABORT:
            self._fail(ErrorCode.CANCELLED, "Request was cancelled")
        else:
            hide_last = reason is FinishReason.STOP and self._hides_stop_token
            self._unsent += self._text.push(token_ids, final=reason is not None, hide_last=hide_last)
            if self._text.stopped_by is not None and reason is None:
                engine.abort(self.request_id)
            self._send_text(final=reason is not None or self._text.stopped_by is not None)

    def _send_text(self, final: bool) -> None:
        if not final and not (self._stream and self._unsent):
            return
        delta, self._unsent = OutputDelta(self._unsent), ""
        self.started = True
        if not final:
            self._channel.send(delta, final=False)
            return
        with self._closing:
            self._channel.send(delta, final=True)
            self._closed = True

    def _fail(self, code: ErrorCode, message: str) -> None:
        with self._closing:
            self._closed = True
            try:
                self._channel.send_error(code, message)
            except Exception:
                logger.exception("request %s: its client cannot be told: %s", self.request_id, message)


class Lane:
    """A sending thread. Streams with something to send wait in line; those without a first response go first."""

    def __init__(self, engine: Aborter, name: str) -> None:
        self.num_streams = 0  # pinned to this lane and not closed
        self._engine = engine
        self._inbox: SimpleQueue[ResponseStream | None] = SimpleQueue()
        self._first: deque[ResponseStream] = deque()
        self._rest: deque[ResponseStream] = deque()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, stream: ResponseStream) -> None:
        """Put a stream that has something to send in line."""
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
            if stream.send_pending(merge=bool(self._first or self._rest), engine=self._engine):
                self._line_up(stream)

    def _next(self) -> ResponseStream | None:
        """The stream whose turn it is; None when the lane is to end."""
        idle = not (self._first or self._rest)
        try:
            while True:
                stream = self._inbox.get(block=idle)
                if stream is None:
                    self._inbox.put(None)  # for the next turn: what is in line goes first
                    break
                self._line_up(stream)
                idle = False
        except Empty:
            pass
        if self._first:
            return self._first.popleft()
        return self._rest.popleft() if self._rest else None

    def _line_up(self, stream: ResponseStream) -> None:
        (self._rest if stream.started else self._first).append(stream)


class SenderPool:
    """The lanes, and the one thread that asks for every open request, queued or running, whether it was cancelled.

    With `NUM_LANES` lanes, each request on one of them: an idle lane sends every token at once, a backlogged one merges
    the tokens that a request has piled up.
    """

    def __init__(self, engine: Aborter) -> None:
        self._engine = engine
        self._lanes = [Lane(engine, f"pagedcore-sender-{number}") for number in range(NUM_LANES)]
        self._lock = threading.Lock()  # guards _streams and the lanes' num_streams
        self._streams: set[ResponseStream] = set()
        self._stopping = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="pagedcore-cancellation", daemon=True)

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

    def discard(self, stream: ResponseStream) -> None:
        """Forget a stream whose request the engine did not take, or that is closed."""
        with self._lock:
            if stream in self._streams:
                self._streams.remove(stream)
                assert stream.lane is not None
                stream.lane.num_streams -= 1

    def stop(self, timeout: float) -> None:
        """Send what the engine has pushed so far, and end the threads; `timeout` in seconds, for each."""
        self._stopping.set()
        for lane in self._lanes:
            lane.stop(timeout)
        self._poller.join(timeout)
        with self._lock:
            self._streams.clear()  # their channels are not to outlive Triton's stub

    def _poll(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                streams = list(self._streams)
            period = min(MAX_POLL_SECONDS, max(MIN_POLL_SECONDS, POLL_SECONDS_PER_STREAM * len(streams)))
            groups = [streams[i : i + POLL_GROUP] for i in range(0, max(1, len(streams)), POLL_GROUP)]
            for group in groups:
                if self._stopping.wait(period / len(groups)):
                    return
                for stream in group:
                    self._poll_one(stream)

    def _poll_one(self, stream: ResponseStream) -> None:
        try:
            if stream.is_cancelled():
                self._engine.abort(stream.request_id)
        except Exception:
            logger.exception("request %s: cannot tell whether it was cancelled", stream.request_id)
        if stream.is_closed:
            self.discard(stream)
