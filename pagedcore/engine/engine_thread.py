"""The engine on a thread of its own: a bounded inbox before it, a sink per request behind it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, replace

from pagedcore.engine.clock import Clock
from pagedcore.engine.deadlines import Deadline, DeadlineTimer
from pagedcore.engine.engine import Engine
from pagedcore.engine.open_requests import OpenRequests
from pagedcore.engine.outputs import EngineStats, OutputSink, TokenOutput
from pagedcore.engine.queue_limits import QueueLimits, RefusalReason
from pagedcore.engine.request import Request
from pagedcore.engine.telemetry import Recorder
from pagedcore.errors import DeadlineError, EngineDeadError, OverloadedError, RequestError, public_text

logger = logging.getLogger(__name__)

STALLED_SECONDS = 60.0  # a step that takes longer than this counts as a stalled engine
_DRAIN_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class _Abort:
    request_id: str
    asked_at: float  # by the clock
    has_expired: bool = False


@dataclass(frozen=True)
class _EndSequence:
    request_id: str
    index: int


class EngineThread:
    """Runs an Engine until shutdown; any thread may submit and abort.

    Every accepted request gets exactly one output with `request_finished`, whatever happens: finished, aborted, failed, or
    the engine's death, or its deadline, when it is answered even if the step in hand does not end; its blocks are free
    after that step. Sinks are called on the engine thread or, at a deadline, on the timer's, and must return at once; they may
    submit and abort.

    A request waits from its submission until it is admitted, at the earliest when the next step is planned. Those that wait
    are bounded by `limits`.
    """

    def __init__(
        self,
        engine: Engine,
        limits: QueueLimits,
        recorder: Recorder | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._recorder = recorder
        self._clock = clock
        self._inbox: deque[Request | _Abort | _EndSequence] = deque()
        self._wake = threading.Event()
        self._has_told_all = False  # of the end those whose requests were open
        self._lock = threading.Lock()  # guards the next five, and the way of requests from the inbox to the engine
        self._closed = False
        self._draining = False
        self._num_posted = 0  # requests in the inbox
        self._num_posted_tokens = 0
        self._refused = dict.fromkeys(RefusalReason, 0)
        self._stopping = False
        self._open = OpenRequests()
        self._deadlines = DeadlineTimer(self._expire, clock)
        self._num_expired = 0
        self._error: Exception | None = None
        self._progress_at = clock()
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="pagedcore-engine", daemon=True)

    def start(self) -> None:
        self._deadlines.start()
        self._thread.start()

    def submit(self, request: Request, sink: OutputSink) -> None:
        """Hand over a request; returns at once.

        Raises RequestError, OverloadedError or EngineDeadError, and then nothing will be pushed.
        """
        try:
            self.check(request)
        except RequestError:
            with self._lock:
                self._refused[RefusalReason.INVALID] += 1
            raise
        self._open.add(request.request_id, sink)
        if request.deadline is not None:
            self._deadlines.watch(request.request_id, request.deadline)
        try:
            self._post_request(request)
        except (OverloadedError, EngineDeadError):
            self._deadlines.forget(request.request_id)
            if self._open.discard(request.request_id):
                raise
            # Else the engine's end or the deadline came in between, and has answered it.

    def check(self, request: Request) -> None:
        """Raise RequestError for what `submit` would refuse as such, before work is put into it; counts nothing."""
        self._engine.check(request)

    def check_room(self) -> None:
        """Raise OverloadedError or EngineDeadError if no request can be taken now, before work is put into one."""
        with self._lock:
            self._check_open()
            self._check_queue(None)

    def _post_request(self, request: Request) -> None:
        with self._lock:
            self._check_open()
            self._check_queue(len(request.prompt_token_ids))
            self._num_posted += 1
            self._num_posted_tokens += len(request.prompt_token_ids)
            self._inbox.append(request)
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """End a request; unless it ends on its own before that, its last output has the reason ABORT."""
        self._post_unless_dead(_Abort(request_id, self._clock()))

    def end_sequence(self, request_id: str, index: int) -> None:
        """End one sequence of a request; unless it ends on its own before that, its last output has the reason STOP."""
        self._post_unless_dead(_EndSequence(request_id, index))

    def _post_unless_dead(self, item: _Abort | _EndSequence) -> None:
        with self._lock:
            if self._closed:
                return  # the engine's end has already answered every request
            self._inbox.append(item)
        self._wake.set()

    def _check_open(self) -> None:
        if self._closed or self._draining:
            self._refused[RefusalReason.STOPPED] += 1
            raise self._end_error()

    def _check_queue(self, num_tokens: int | None) -> None:
        """`num_tokens`: of the prompt; None: not known yet, so that only the number of requests can be too large."""
        waiting = self._engine.scheduler.waiting
        num_waiting, num_waiting_tokens = self._num_posted + len(waiting), self._num_posted_tokens + waiting.num_tokens
        if num_tokens is None:
            num_waiting_tokens = num_tokens = 0
        reason = self._limits.refusal(num_waiting, num_waiting_tokens, num_tokens)
        if reason is not None:
            self._refused[reason] += 1
            raise self._limits.error(reason, num_waiting, num_waiting_tokens, num_tokens)

    def stats(self) -> EngineStats:
        """The engine's counters as of about now; what is in the inbox waits, too."""
        stats = self._engine.stats()
        with self._lock:
            return replace(
                stats,
                num_waiting=stats.num_waiting + self._num_posted,
                num_waiting_tokens=stats.num_waiting_tokens + self._num_posted_tokens,
                refused_total=dict(self._refused),
                expired_total=self._num_expired,
            )

    def is_healthy(self) -> bool:
        """Whether the engine takes requests, and its thread is alive and making progress."""
        if self._closed or self._draining or not self._thread.is_alive():
            return False
        return not self._busy or self._clock() - self._progress_at < STALLED_SECONDS

    @property
    def failure(self) -> Exception | None:
        """What the engine died of; None while it lives or somebody is still to hear of it, and after an orderly end."""
        return self._error if self._has_told_all else None

    def drain(self, patience: float, timeout: float = 2.0) -> None:
        """Take no more requests, let the open ones go on for `patience` seconds at most, then end them with EngineDeadError.

        Returns when all have ended: at once where none is open, and `timeout` seconds after that at the latest where the step
        in hand does not end. Only `shutdown` may follow.
        """
        with self._lock:
            self._draining = True
        deadline = time.monotonic() + patience
        while len(self._open) > 0 and time.monotonic() < deadline:
            time.sleep(_DRAIN_POLL_SECONDS)
        self._end_thread(timeout)

    def shutdown(self, timeout: float = 8.0) -> None:
        """Stop after the step in hand, at most `timeout` seconds from now; what is unfinished ends with EngineDeadError.

        A step that does not end keeps its device. A device that has failed may not be released in order: that is logged.
        """
        self._end_thread(timeout)
        if self._thread.is_alive():
            return
        try:
            self._engine.shutdown()
        except Exception:
            logger.exception("the device has not been released")

    def _end_thread(self, timeout: float) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        if self._thread.is_alive():
            logger.error("the step in hand has not ended after %.0f s; leaving it behind", timeout)
            self.close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not self.turn():
                    self._wake.wait()
                    self._wake.clear()
        except Exception as error:
            logger.exception("the engine stopped")
            self.close(error)
        finally:
            self.close()

    def turn(self) -> bool:
        """Take what has come in, and run a step if there is work; False: there is none.

        For the engine's thread, and for who drives an engine whose threads have not been started. What this raises has ended
        the engine: `close` is to follow.
        """
        self._drain_inbox()
        self._progress_at = self._clock()
        self._busy = self._engine.has_work()
        if self._busy:
            self._deliver(self._engine.step())
        return self._busy

    def expire_due(self) -> None:
        """Answer the requests whose deadlines have passed, as the timer does by itself once it has been started."""
        self._deadlines.expire_due()

    def _drain_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Request):
                self._add(item)
            elif isinstance(item, _EndSequence):
                self._deliver(self._engine.end_sequence(item.request_id, item.index))
            else:
                self._abort(item)

    def _add(self, request: Request) -> None:
        try:
            with self._lock:
                if self._closed:
                    return  # all requests have been answered
                self._num_posted -= 1
                self._num_posted_tokens -= len(request.prompt_token_ids)
                if request.request_id in self._open:  # else its deadline has passed
                    self._engine.add_request(request)
        except Exception as error:  # scoped to this request: it has not become part of anything
            if not isinstance(error, RequestError):
                logger.exception("request %s could not be added", request.request_id)
            self._deadlines.forget(request.request_id)
            self._open.fail(request.request_id, error)

    def _abort(self, item: _Abort) -> None:
        output = self._engine.abort(item.request_id)
        if output is not None:
            if self._recorder is not None:
                self._recorder.add_cancel(self._clock() - item.asked_at)
            self._deliver([output])
        if item.has_expired:
            self._open.release(item.request_id)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        self._open.deliver(outputs)
        for output in outputs:
            if output.request_finished:
                self._deadlines.forget(output.request_id)

    def _expire(self, request_id: str, deadline: Deadline) -> None:
        """End a request whose deadline has passed. Runs on the timer's thread."""
        progress = self._engine.progress(request_id)
        elapsed = self._clock() - deadline.begin
        error = DeadlineError(
            f"deadline of {deadline.timeout * 1000:g} ms exceeded after {elapsed * 1000:.0f} ms "
            f"({progress.state}, {progress.num_output_tokens} tokens generated)"
        )
        if self._open.expire(request_id, error):
            with self._lock:
                self._num_expired += 1
            self._post_unless_dead(_Abort(request_id, self._clock(), has_expired=True))

    def close(self, error: Exception | None = None) -> None:
        """Refuse what comes from now on, and end everything that is still open, whatever state the engine is in.

        `error`: what has ended the engine; the first one counts.
        """
        with self._lock:
            self._error = self._error or error
            self._closed = True
            self._inbox.clear()
            self._num_posted = self._num_posted_tokens = 0
        self._deadlines.stop()
        self._open.fail_all(self._end_error())
        self._has_told_all = True

    def _end_error(self) -> EngineDeadError:
        if self._error is None:
            return EngineDeadError("the server is shutting down")
        reason = str(self._error) if isinstance(self._error, EngineDeadError) else public_text(self._error)
        return EngineDeadError(f"the engine has stopped: {reason}")
