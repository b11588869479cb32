"""From the engine's outputs to a request's responses: one ResponseStream per request."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.sequence import FinishReason
from pagedcore.errors import (
    DeadlineError,
    EngineDeadError,
    NonFiniteLogitsError,
    OverloadedError,
    RequestError,
    public_text,
)
from pagedcore_triton.protocol import OutputDelta
from pagedcore_triton.requests import LoraDisabledError
from pagedcore_triton.sequence_output import PromptOutput, SequenceOutput

logger = logging.getLogger(__name__)

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


class EngineControl(Protocol):
    """The part of the engine that a response needs."""

    def abort(self, request_id: str) -> None: ...

    def end_sequence(self, request_id: str, index: int) -> None: ...


class SendingLane(Protocol):
    """The part of a sending thread that a stream needs."""

    num_streams: int

    def put(self, stream: ResponseStream) -> None:
        """Put a stream that has something to send in line, or, if it is there, where it belongs by now."""
        ...


def error_of(error: Exception) -> tuple[ErrorCode, str]:
    """What to tell a client about an error. Only the project's own errors are worded for clients."""
    if isinstance(error, LoraDisabledError):
        return ErrorCode.INVALID_ARG, str(error)
    if isinstance(error, RequestError):
        return ErrorCode.INVALID_ARG, GENERATION_ERROR + str(error)
    if isinstance(error, (EngineDeadError, OverloadedError, DeadlineError)):
        return ErrorCode.UNAVAILABLE, GENERATION_ERROR + str(error)
    if isinstance(error, NonFiniteLogitsError):
        return ErrorCode.INTERNAL, GENERATION_ERROR + str(error)
    return ErrorCode.INTERNAL, GENERATION_ERROR + public_text(error)


class ResponseStream:
    """One request's responses. It sees to it that exactly one of them is final, whatever happens.

    A response tells the next token of every sequence that has not ended, so that the number of responses does not depend
    on how the engine's outputs arrive; only a lane that is behind merges several tokens of a sequence into one.

    `push` may come from any thread, but not from two at once: mostly the engine's, at a deadline the timer's, at the engine's
    end the one that ends it. `send_pending` belongs to the lane that the stream is pinned to; any thread may ask whether it
    is cancelled or closed.
    """

    def __init__(
        self,
        request_id: str,
        channel: Channel,
        sequences: Sequence[SequenceOutput],
        *,
        stream: bool,
        has_stop_strings: bool = False,
        num_input_tokens: int = 0,
        prompt: PromptOutput | None = None,
    ) -> None:
        """`has_stop_strings`: the text may end before the engine knows. `prompt`: where there is something to tell of it."""
        self.request_id = request_id
        self.lane: SendingLane | None = None
        self.started = False  # the first response has been sent
        self.cancelling = False  # the poller has found the client gone
        self.cannot_ask = False  # the poller has failed to ask whether it is
        self._channel = channel
        self._sequences = sequences
        self._num_input_tokens = num_input_tokens
        self._prompt = prompt
        self._stream = stream
        self._looks_at_every_token = stream or has_stop_strings
        self._pending: list[deque[TokenOutput]] = [deque() for _ in sequences]
        self._failure: TokenOutput | None = None
        self._num_open = len(sequences)  # those that the engine has not ended
        self._in_line = False  # at most once, so that a lane with one stream in line knows that it is idle otherwise
        self._lining_up = threading.Lock()
        self._closed = False
        self._closing = threading.Lock()  # nobody may ask the channel anything once the final send has begun

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def is_urgent(self) -> bool:
        """Whether its client waits for the first response, or for the last one."""
        return not self.started or self._is_ending()

    def push(self, output: TokenOutput) -> None:
        """Take an output from the engine; returns at once."""
        if output.finish_reason is None and output.prompt_logprobs is None:
            self._pending[output.index].append(output)
            if self._in_line:  # as most are under load: their lane looks for more once they have left the line
                return
        else:
            self._take(output)
        with self._lining_up:
            if not self._has_response() or (self._in_line and not self._is_ending()):
                return
            self._in_line = True
        assert self.lane is not None
        self.lane.put(self)

    def _take(self, output: TokenOutput) -> None:
        """Take an output that tells more than the next token."""
        if output.prompt_logprobs is not None and self._prompt is not None:
            self._prompt.take(output.prompt_logprobs)
        with self._lining_up:
            if output.finish_reason is FinishReason.ERROR or output.finish_reason is FinishReason.ABORT:
                self._failure = output
            else:
                self._pending[output.index].append(output)
                self._num_open -= output.finish_reason is not None

    def refuse(self, error: Exception) -> None:
        """Answer a request that the engine did not take. Nothing has been or will be pushed."""
        self._fail(*error_of(error))

    def is_cancelled(self) -> bool:
        """True if the client has gone and does not know the end yet."""
        with self._closing:
            return not self._closed and self._channel.is_cancelled()

    def send_pending(self, merge: bool, engine: EngineControl) -> bool:
        """Send what the engine has pushed, as one response if `merge`, else the next token of each sequence only.

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
            # Before what is pending is looked at: who pushes to a stream in line does not wait for this.
            self._in_line = False
            self._in_line = not self._closed and self._has_response()
            return self._in_line

    def _is_ending(self) -> bool:
        """Whether the engine has said all that it will."""
        return self._num_open == 0 or self._failure is not None

    def _has_response(self) -> bool:
        """Whether the pending outputs make a response, or an end."""
        if self._failure is not None:
            return True
        if self._num_open == 0:
            return any(self._pending)
        if not self._looks_at_every_token:
            return False
        for sequence, pending in zip(self._sequences, self._pending, strict=True):
            if not pending and sequence.finish_reason is None:
                return False
        return True

    def _send_next(self, merge: bool, engine: EngineControl) -> None:
        if self._closed:
            return
        if not any(self._pending):
            self._send_failure()
            return
        stopped_by_text: list[int] = []
        for index, (sequence, pending) in enumerate(zip(self._sequences, self._pending, strict=True)):
            count = len(pending) if merge or not self._stream else min(1, len(pending))
            if count and sequence.take([pending.popleft() for _ in range(count)]):
                stopped_by_text.append(index)
        final = all(sequence.finish_reason is not None for sequence in self._sequences)
        for index in stopped_by_text:
            engine.end_sequence(self.request_id, index)
        if final or self._stream:
            self._send(final)

    def _send(self, final: bool) -> None:
        prompt_logprobs = "null" if self._prompt is None else self._prompt.logprobs_json()
        sequences = [sequence.delta() for sequence in self._sequences]
        delta = OutputDelta(sequences, self._num_input_tokens, prompt_logprobs)
        self.started = True
        if not final:
            self._channel.send(delta, final=False)
            return
        with self._closing:
            self._channel.send(delta, final=True)
            self._closed = True

    def _send_failure(self) -> None:
        if self._failure is None:
            return
        if self._failure.finish_reason is FinishReason.ABORT:
            self._fail(ErrorCode.CANCELLED, "Request was cancelled")
            logger.info("[vllm] Successfully cancelled the request (%s)", self.request_id)
            return
        error = self._failure.error
        assert error is not None
        level = logging.INFO if isinstance(error, DeadlineError) else logging.ERROR
        logger.log(level, "request %s failed: %r", self.request_id, error)
        self._fail(*error_of(error))

    def _fail(self, code: ErrorCode, message: str) -> None:
        with self._closing:
            self._closed = True
            try:
                self._channel.send_error(code, message)
            except Exception:
                logger.exception("request %s: its client cannot be told: %s", self.request_id, message)
