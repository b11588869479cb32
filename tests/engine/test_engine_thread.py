"""The engine thread: every accepted request gets exactly one final output, whoever does what when."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import pytest

from pagedcore.engine.deadlines import Deadline
from pagedcore.engine.engine_thread import EngineThread
from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.queue_limits import QueueLimits, RefusalReason
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import FinishReason
from pagedcore.errors import DeadlineError, EngineDeadError, OverloadedError, RequestError
from tests.engine.collector import Collector, deaths_told
from tests.engine.test_schedule_invariance import expected, make_engine, make_requests
from tests.reference.fake_model import FakeExecutor

WAIT = 20.0
NO_LIMITS = QueueLimits()


@pytest.fixture
def running() -> Iterator[tuple[EngineThread, FakeExecutor]]:
    engine, executor, _ = make_engine(num_blocks=48)
    thread = EngineThread(engine, NO_LIMITS)
    thread.start()
    yield thread, executor
    thread.shutdown()


def test_concurrent_submitters_get_their_own_tokens(running: tuple[EngineThread, FakeExecutor]) -> None:
    thread, _ = running
    requests = make_requests(5, 40)
    sinks = {request.request_id: Collector() for request in requests}

    def submit(part: list[Request]) -> None:
        for request in part:
            thread.submit(request, sinks[request.request_id])
            time.sleep(random.random() * 0.002)

    workers = [threading.Thread(target=submit, args=(requests[i::4],)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(sink.ended.wait(WAIT) for sink in sinks.values())
    wanted = expected(requests)
    assert {name: sink.token_ids for name, sink in sinks.items()} == wanted
    stats = thread.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)


def test_aborts_race_with_the_engine_and_still_end_once(running: tuple[EngineThread, FakeExecutor]) -> None:
    thread, _ = running
    requests = make_requests(6, 60)
    sinks = {request.request_id: Collector() for request in requests}
    for request in requests:
        thread.submit(request, sinks[request.request_id])
    rng = random.Random(0)
    for victim in rng.sample(requests, 40):
        thread.abort(victim.request_id)
        thread.abort(victim.request_id)
        time.sleep(rng.random() * 0.004)
    assert all(sink.ended.wait(WAIT) for sink in sinks.values())
    reasons = {sink.reason for sink in sinks.values()}
    assert FinishReason.ABORT in reasons and reasons <= {FinishReason.ABORT, FinishReason.STOP, FinishReason.LENGTH}
    wanted = expected(requests)
    for name, sink in sinks.items():
        assert sink.token_ids == wanted[name][: len(sink.token_ids)]
        if sink.reason is not FinishReason.ABORT:
            assert sink.token_ids == wanted[name]


def test_refusals_are_raised(running: tuple[EngineThread, FakeExecutor]) -> None:
    thread, _ = running
    with pytest.raises(RequestError, match="prompt is empty"):
        thread.submit(Request("empty", [], SamplingParams()), Collector())
    first, second = Collector(), Collector()
    request = Request("twice", [1, 2, 3], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    thread.submit(request, first)
    with pytest.raises(RequestError, match="'twice' is in use"):
        thread.submit(request, second)
    assert first.ended.wait(WAIT)
    assert first.reason is FinishReason.LENGTH and not second.outputs


def test_shutdown_ends_what_is_open_and_refuses_what_comes(running: tuple[EngineThread, FakeExecutor]) -> None:
    thread, _ = running
    sinks = []
    for number in range(30):
        sinks.append(Collector())
        params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
        thread.submit(Request(str(number), [number + 1] * 10, params), sinks[-1])
    thread.shutdown()
    assert all(sink.ended.is_set() for sink in sinks)
    assert any(isinstance(sink.outputs[-1].error, EngineDeadError) for sink in sinks)
    assert not thread.is_healthy()
    with pytest.raises(EngineDeadError):
        thread.submit(Request("late", [1], SamplingParams()), Collector())
    thread.abort("late")
    thread.shutdown()


def test_who_asks_hears_of_a_death_when_all_clients_have(running: tuple[EngineThread, FakeExecutor]) -> None:
    """A server ends its process then: what has not been sent by that time never will be."""
    thread, executor = running
    failures: list[Exception | None] = []

    class Sink(Collector):
        def push(self, output: TokenOutput) -> None:
            failures.append(thread.failure)
            super().push(output)

    sinks = [Sink() for _ in range(20)]
    executor.hang = threading.Event()
    for number, sink in enumerate(sinks):
        thread.submit(Request(str(number), [1, 2, 3], SamplingParams(max_tokens=80, ignore_eos=True)), sink)
    thread.close(EngineDeadError("the end"))
    executor.hang.set()
    assert deaths_told([*sinks]) == {"the engine has stopped: the end"}
    assert failures == [None] * len(sinks)
    assert isinstance(thread.failure, EngineDeadError)


def test_draining_lets_short_requests_finish_ends_long_ones_and_refuses_new_ones(
    running: tuple[EngineThread, FakeExecutor],
) -> None:
    thread, executor = running
    executor.hang = threading.Event()  # until all is submitted
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    short, aborted = Request("short", [1, 2, 3], params), Request("aborted", [4, 5, 6], params)
    sinks = {request.request_id: Collector() for request in (short, aborted)}
    for request in (short, aborted):
        thread.submit(request, sinks[request.request_id])
    draining = threading.Thread(target=thread.drain, args=(WAIT,))
    draining.start()
    deadline = time.monotonic() + WAIT
    with pytest.raises(EngineDeadError, match="the server is shutting down"):
        while time.monotonic() < deadline:
            thread.submit(Request("late", [1], params), Collector())
    thread.abort("aborted")
    executor.hang.set()
    draining.join(WAIT / 2)  # it does not use up its patience
    assert not draining.is_alive()
    assert sinks["short"].token_ids == expected([short])["short"]
    assert sinks["aborted"].reason is FinishReason.ABORT
    assert not thread.is_healthy() and thread.failure is None


def test_draining_ends_what_outlasts_its_patience(running: tuple[EngineThread, FakeExecutor]) -> None:
    thread, executor = running
    executor.hang = threading.Event()
    sink = Collector()
    thread.submit(Request("long", [1, 2, 3], SamplingParams(max_tokens=80, ignore_eos=True)), sink)
    draining = threading.Thread(target=thread.drain, args=(0.1, WAIT))
    draining.start()
    time.sleep(0.2)
    assert not sink.ended.is_set(), "the step in hand is waited for"
    assert not thread.is_healthy(), "it takes no more requests"
    executor.hang.set()
    assert sink.ended.wait(WAIT)
    assert isinstance(sink.outputs[-1].error, EngineDeadError)
    draining.join(WAIT)


def test_a_dying_engine_answers_everyone_and_reports_it(running: tuple[EngineThread, FakeExecutor]) -> None:
    thread, executor = running
    assert thread.is_healthy()
    executor.fail_steps = set(range(10_000))
    sinks = [Collector() for _ in range(30)]
    for number, sink in enumerate(sinks):
        try:
            thread.submit(Request(str(number), [number + 1] * 10, SamplingParams()), sink)
        except EngineDeadError:
            sink.ended.set()
    assert all(sink.ended.wait(WAIT) for sink in sinks)
    assert all(sink.reason is FinishReason.ERROR for sink in sinks if sink.outputs)
    deadline = time.monotonic() + WAIT
    while thread.is_healthy() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not thread.is_healthy()
    assert "3 steps in a row failed" in str(thread.failure)
    assert "planted failure" in str(thread.failure and thread.failure.__cause__)
    assert deaths_told(sinks) == {
        "the engine has stopped: 3 steps in a row failed; internal error (RuntimeError), see the server's log"
    }


def test_an_error_of_the_engine_itself_is_answered_too(running: tuple[EngineThread, FakeExecutor]) -> None:
    thread, executor = running
    executor.short_steps = {12}  # commit stops half-way: some sequences have ended, others have not
    sinks = [Collector() for _ in range(20)]
    for number, sink in enumerate(sinks):
        params = SamplingParams(temperature=0, max_tokens=3 + number, ignore_eos=True)
        thread.submit(Request(str(number), [number + 1] * 10, params), sink)
    assert all(sink.ended.wait(WAIT) for sink in sinks)
    assert deaths_told(sinks) == {"the engine has stopped: internal error (IndexError), see the server's log"}
    assert not thread.is_healthy()


def test_shutdown_does_not_wait_for_a_step_that_never_ends(running: tuple[EngineThread, FakeExecutor]) -> None:
    thread, executor = running
    executor.hang = threading.Event()
    sinks = [Collector() for _ in range(4)]
    for number, sink in enumerate(sinks):
        thread.submit(Request(str(number), [number + 1] * 10, SamplingParams()), sink)
    assert executor.hangs.wait(WAIT)
    stopping = threading.Thread(target=thread.shutdown, kwargs={"timeout": 0.2}, daemon=True)
    stopping.start()
    stopping.join(WAIT)
    try:
        assert not stopping.is_alive()
        assert all(sink.ended.is_set() for sink in sinks)
    finally:
        executor.hang.set()


def test_a_device_that_cannot_be_released_does_not_stop_the_shutdown(
    running: tuple[EngineThread, FakeExecutor], caplog: pytest.LogCaptureFixture
) -> None:
    thread, executor = running
    executor.shutdown_error = RuntimeError("an illegal memory access was encountered")
    thread.shutdown()
    assert "an illegal memory access" in caplog.text


def hanging(*, limits: QueueLimits = NO_LIMITS) -> tuple[EngineThread, threading.Event, Collector]:
    """An engine whose step in hand does not end before the event is set, and the request that is in it."""
    engine, executor, _ = make_engine(num_blocks=48)
    executor.hang, executor.hang_from = threading.Event(), 6
    thread = EngineThread(engine, limits)
    thread.start()
    first = Collector()
    thread.submit(Request("first", [1] * 9, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)), first)
    assert executor.hangs.wait(WAIT)
    return thread, executor.hang, first


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "the condition does not come true"
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("limits", "lengths", "last", "reason", "message"),
    [
        (
            QueueLimits(max_queue_size=3),
            [9, 9, 9],
            1,
            RefusalReason.QUEUE_SIZE,
            "3 requests are waiting, and max_queue_size is 3",
        ),
        (
            QueueLimits(max_queue_tokens=40),
            [30, 10],
            1,
            RefusalReason.QUEUE_TOKENS,
            "requests with 40 prompt tokens are waiting, this one has 1, and max_queue_tokens is 40",
        ),
        (QueueLimits(9, 20), [50], 5, RefusalReason.QUEUE_TOKENS, "with 50 prompt tokens .* has 5, .* is 20"),
    ],
)
def test_a_full_queue_refuses_at_once_and_takes_requests_again_when_it_is_shorter(
    limits: QueueLimits, lengths: list[int], last: int, reason: RefusalReason, message: str
) -> None:
    thread, hang, first = hanging(limits=limits)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    sinks = [Collector() for _ in lengths]
    for number, (length, sink) in enumerate(zip(lengths, sinks, strict=True)):
        thread.submit(Request(str(number), [2] * length, params), sink)
    for _ in range(2):
        with pytest.raises(OverloadedError, match=f"the queue is full: .*{message}; try again later"):
            thread.submit(Request("too many", [3] * last, params), Collector())
    assert thread.stats().refused_total[reason] == 2
    assert thread.stats().num_waiting == len(lengths)
    has_room = reason is not RefusalReason.QUEUE_SIZE  # as far as can be told without the prompt
    with nullcontext() if has_room else pytest.raises(OverloadedError, match=message):
        thread.check_room()
    assert thread.stats().refused_total[reason] == (2 if has_room else 3)
    hang.set()
    assert first.ended.wait(WAIT) and all(sink.ended.wait(WAIT) for sink in sinks)
    again = Collector()
    thread.submit(Request("0", [3] * last, params), again)  # the id is free, too
    assert again.ended.wait(WAIT) and again.reason is FinishReason.LENGTH
    thread.shutdown()


def test_deadlines_are_kept_while_the_engine_hangs_and_the_blocks_come_back_after_it() -> None:
    thread, hang, _ = hanging()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    late, patient = Collector(), Collector()
    thread.submit(Request("late", [2] * 9, params, deadline=Deadline(0.05, time.monotonic())), late)
    thread.submit(Request("patient", [2] * 9, params, deadline=Deadline(3600, time.monotonic())), patient)
    assert late.ended.wait(WAIT)
    error = late.outputs[-1].error
    assert isinstance(error, DeadlineError)
    assert re.fullmatch(r"deadline of 50 ms exceeded after \d+ ms \(queued, 0 tokens generated\)", str(error))
    assert thread.stats().expired_total == 1
    assert not patient.ended.is_set()
    hang.set()
    assert patient.ended.wait(WAIT) and patient.reason is FinishReason.LENGTH
    until(lambda: thread.stats().num_free_blocks == thread.stats().num_blocks)
    thread.shutdown()


def test_nothing_waits_in_a_closed_engine() -> None:
    engine, _, _ = make_engine()
    thread = EngineThread(engine, NO_LIMITS)
    sink = Collector()
    thread.submit(Request("x", [2] * 9, SamplingParams()), sink)
    assert (thread.stats().num_waiting, thread.stats().num_waiting_tokens) == (1, 9)
    thread.close()
    assert sink.reason is FinishReason.ERROR
    assert (thread.stats().num_waiting, thread.stats().num_waiting_tokens) == (0, 0)


def test_a_deadline_ends_a_running_request_once_and_says_how_far_it_got() -> None:
    engine, executor, _ = make_engine(num_blocks=48)
    thread = EngineThread(engine, NO_LIMITS)
    thread.start()
    sink = Collector()
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    executor.hang, executor.hang_from = threading.Event(), 6
    thread.submit(Request("x", [2] * 9, params, deadline=Deadline(0.5, time.monotonic())), sink)
    assert sink.ended.wait(WAIT)
    found = re.search(r"\(running, (\d+) tokens generated\)", str(sink.outputs[-1].error))
    assert found is not None and int(found[1]) == len(sink.token_ids) > 0
    executor.hang.set()
    until(lambda: thread.stats().num_free_blocks == thread.stats().num_blocks)
    assert thread.stats().generation_tokens_total < 20, "it does not go on for nobody"
    thread.shutdown()


@dataclass
class ClosedLoop(Collector):
    """Submits the next request when one has ended, on the engine's thread."""

    engine: EngineThread | None = None
    name: str = ""
    left: int = 0

    def push(self, output: TokenOutput) -> None:
        if output.finish_reason is None:
            return
        if self.left == 0:
            self.ended.set()
            return
        self.left -= 1
        assert self.engine is not None
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        self.engine.submit(Request(self.name, [1] * 5, params, deadline=Deadline(60, time.monotonic())), self)


def test_sinks_may_submit_while_other_threads_do(running: tuple[EngineThread, FakeExecutor]) -> None:
    thread, _ = running
    loops = [ClosedLoop(engine=thread, name=f"loop{number}", left=60) for number in range(8)]

    def start(loop: ClosedLoop) -> None:
        loop.push(TokenOutput(loop.name, 0, [], FinishReason.LENGTH))
        for number in range(60):
            params = SamplingParams(temperature=0, max_tokens=1)
            thread.submit(Request(f"{loop.name}-{number}", [2] * 5, params), Collector())

    starters = [threading.Thread(target=start, args=(loop,)) for loop in loops]
    for starter in starters:
        starter.start()
    assert all(loop.ended.wait(WAIT) for loop in loops)
    for starter in starters:
        starter.join(WAIT)
    until(lambda: thread.stats().num_free_blocks == thread.stats().num_blocks)
