"""The engine on a thread of its own: an inbox before it, a sink per request behind it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

from pagedcore.engine.engine import Engine
from pagedcore.engine.outputs import EngineStats, OutputSink, TokenOutput
from pagedcore.engine.request import Request
from pagedcore.engine.sequence import FinishReason
from pagedcore.engine.telemetry import Recorder
from pagedcore.errors import EngineDeadError, RequestError

logger = logging.getLogger(__name__)

STALLED_SECONDS = 60.0  # a step that takes longer than this counts as a stalled engine
_DRAIN_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class _Submission:
    request: Request
    sink: OutputSink


@dataclass(frozen=True)
class _Abort:
    request_id: str
    asked_at: float  # time.monotonic


@dataclass(frozen=True)
class _EndSequence:
    request_id: str
    index: int


class EngineThread:
    """Runs an Engine until shutdown; any thread may submit and abort.

    Every accepted request gets exactly one output with `request_finished`, whatever happens: finished, aborted, failed, or
    the engine's death. Sinks are called on the engine thread and must return at once.
    """

    def __init__(self, engine: Engine, recorder: Recorder | None = None) -> None:
        self._engine = engine
        self._recorder = recorder
        self._inbox: deque[_Submission | _Abort | _EndSequence] = deque()
        self._wake = threading.Event()
        self._lock = threading.Lock()  # guards the next two against a submit that would be left behind in the inbox
        self._closed = False
        self._draining = False
        self._stopping = False
        self._sinks: dict[str, OutputSink] = {}
        self._error: Exception | None = None
        self._progress_at = time.monotonic()
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="pagedcore-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, sink: OutputSink) -> None:
        """Hand over a request; returns at once. Raises RequestError or EngineDeadError, and then nothing will be pushed."""
        self._engine.check(request)
        self._post(_Submission(request, sink))

    def abort(self, request_id: str) -> None:
        """End a request; unless it ends on its own before that, its last output has the reason ABORT."""
        self._post_unless_dead(_Abort(request_id, time.monotonic()))

    def end_sequence(self, request_id: str, index: int) -> None:
        """End one sequence of a request; unless it ends on its own before that, its last output has the reason STOP."""
        self._post_unless_dead(_EndSequence(request_id, index))

    def _post_unless_dead(self, item: _Abort | _EndSequence) -> None:
        with contextlib.suppress(EngineDeadError):  # the engine's end has already answered every request
            self._post(item)

    def _post(self, item: _Submission | _Abort | _EndSequence) -> None:
        with self._lock:
            if self._closed or (self._draining and isinstance(item, _Submission)):
                raise self._end_error()
            self._inbox.append(item)
        self._wake.set()

    def stats(self) -> EngineStats:
        """The engine's counters as of about now."""
        return self._engine.stats()

    def is_healthy(self) -> bool:
        """Whether the engine thread is alive and making progress."""
        if self._closed or not self._thread.is_alive():
            return False
        return not self._busy or time.monotonic() - self._progress_at < STALLED_SECONDS

    @property
    def failure(self) -> Exception | None:
        """What the engine died of; None while it lives and after an orderly end."""
        return self._error if self._closed else None

    def drain(self, patience: float, timeout: float = 2.0) -> None:
        """Take no more requests, let the open ones go on for `patience` seconds at most, then end them with EngineDeadError.

        Returns when all have ended: at once where none is open, and `timeout` seconds after that at the latest where the step
        in hand does not end. Only `shutdown` may follow.
        """
        with self._lock:
            self._draining = True
        deadline = time.monotonic() + patience
        while (self._inbox or self._sinks) and time.monotonic() < deadline:
            time.sleep(_DRAIN_POLL_SECONDS)
        self._end_thread(timeout)

    def shutdown(self, timeout: float = 8.0) -> None:
        """Stop after the step in hand, at most `timeout` seconds from now; what is unfinished ends with EngineDeadError."""
        self._end_thread(timeout)
        self._engine.shutdown()

    def _end_thread(self, timeout: float) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        if self._thread.is_alive():
            logger.error("the step in hand has not ended after %.0f s; leaving it behind", timeout)
            self._close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._drain_inbox()
                self._progress_at = time.monotonic()
                if self._engine.has_work():
                    self._busy = True
                    self._deliver(self._engine.step())
                else:
                    self._busy = False
                    self._wake.wait()
                    self._wake.clear()
        except Exception as error:
            logger.exception("the engine stopped")
            self._error = error
        finally:
            self._close()

    def _drain_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, _Submission):
                self._add(item.request, item.sink)
            elif isinstance(item, _EndSequence):
                self._deliver(self._engine.end_sequence(item.request_id, item.index))
            elif (output := self._engine.abort(item.request_id)) is not None:
                if self._recorder is not None:
                    self._recorder.add_cancel(time.monotonic() - item.asked_at)
                self._deliver([output])

    def _add(self, request: Request, sink: OutputSink) -> None:
        try:
            self._engine.add_request(request)
        except Exception as error:  # scoped to this request: it has not become part of anything
            if not isinstance(error, RequestError):
                logger.exception("request %s could not be added", request.request_id)
            sink.push(_error_output(request.request_id, error))
        else:
            self._sinks[request.request_id] = sink

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            if output.request_finished:
                self._sinks.pop(output.request_id).push(output)
            else:
                self._sinks[output.request_id].push(output)

    def _close(self) -> None:
        """Refuse what comes from now on, and end everything that is still open, whatever state the engine is in."""
        with self._lock:
            self._closed = True
        error = self._end_error()
        # Item by item: after a shutdown that did not wait, the engine thread may get here as well.
        with contextlib.suppress(IndexError):
            while True:
                item = self._inbox.popleft()
                if isinstance(item, _Submission):
                    item.sink.push(_error_output(item.request.request_id, error))
        with contextlib.suppress(KeyError):
            while True:
                request_id, sink = self._sinks.popitem()
                sink.push(_error_output(request_id, error))

    def _end_error(self) -> EngineDeadError:
        if self._error is None:
            return EngineDeadError("the server is shutting down")
        return EngineDeadError(f"the engine has stopped: {self._error}")


def _error_output(request_id: str, error: Exception) -> TokenOutput:
    return TokenOutput(request_id, 0, [], FinishReason.ERROR, error=error, request_finished=True)
