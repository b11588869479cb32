"""The recorded times against those that an observer of every single token writes down."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest

from pagedcore._core import BlockManager
from pagedcore.engine.engine import Engine, EngineLimits
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.sequence import FinishReason
from pagedcore.engine.telemetry import Recorder, RequestRecord, StepRecord
from tests.reference.fake_model import FakeExecutor

BLOCKS, BLOCK_SIZE, VOCAB = 24, 4, 97


class Clock:
    """Stands still until it is moved; by multiples of 1/64 s, which add up without rounding."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_recorded_engine(recorder: Recorder, one_step_ahead: bool, clock: Clock) -> Engine:
    """A pool so small that requests are preempted, and steps so small that prompts come in chunks."""
    executor = FakeExecutor(BLOCKS, BLOCK_SIZE, VOCAB, max_rows=8, max_tokens=16, max_width=32)
    blocks = BlockManager(BLOCKS, BLOCK_SIZE)
    scheduler = Scheduler(SchedulerConfig(8, 16), blocks, executor.step_buffers(), recorder=recorder, clock=clock)
    limits = EngineLimits(96, VOCAB, 20, frozenset(range(8)))
    return Engine(scheduler, executor, limits, one_step_ahead=one_step_ahead)


def make_requests(rng: random.Random, clock: Clock) -> list[Request]:
    requests: list[Request] = []
    for number in range(40):
        # The first prompt fits the first step, which has no step before it.
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40) if requests else 3)]
        params = SamplingParams(
            n=rng.choice((1, 1, 1, 3)), temperature=1, max_tokens=rng.randint(1, 16), ignore_eos=rng.random() < 0.7
        )
        requests.append(Request(str(number), prompt, params, arrived_at=clock.now))
    return requests


@pytest.mark.parametrize("one_step_ahead", [False, True])
def test_times_between_tokens_and_of_requests(one_step_ahead: bool) -> None:
    rng = random.Random(11)
    clock, recorder = Clock(), Recorder()
    engine = make_recorded_engine(recorder, one_step_ahead, clock)
    requests = make_requests(rng, clock)
    by_id = {request.request_id: request for request in requests}
    token_at: dict[tuple[str, int], float] = {}
    intervals: Counter[float] = Counter()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    counts: Counter[str] = Counter()
    ends: dict[str, tuple[FinishReason | None, float]] = {}
    for request in requests:
        engine.add_request(request)
    while engine.has_work():
        clock.now += rng.randint(1, 9) / 64
        outputs = engine.step()
        if rng.random() < 0.05:
            victim = rng.choice([name for name in by_id if name not in ends] or ["none"])
            outputs += [output] if (output := engine.abort(victim)) else []
        for output in outputs:
            name, key = output.request_id, (output.request_id, output.index)
            for _ in output.token_ids:
                if key in token_at:
                    intervals[clock.now - token_at[key]] += 1
                token_at[key] = last[name] = clock.now
                first.setdefault(name, clock.now)
                counts[name] += 1
            if output.request_finished:
                ends[name] = (output.finish_reason, clock.now)
    records = recorder.take()
    assert engine.stats().preemptions_total > 0
    assert {reason for reason, _ in ends.values()} == {FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT}

    assert recorded_intervals(records.steps) == intervals
    assert max(intervals) > 9 / 64, "nobody sat out a step"
    times_to_first_token = [time for step in records.steps for time in step.times_to_first_token]
    assert sorted(times_to_first_token) == sorted(at - by_id[name].arrived_at for name, at in first.items())
    assert len(records.requests) == len(requests)
    told = Counter((record.finish_reason, record.ended_at) for record in records.requests)
    assert told == Counter(ends.values())
    assert sorted(phases(record) for record in records.requests if record.first_token_at) == sorted(
        (len(by_id[name].prompt_token_ids), counts[name], first[name], last[name]) for name in first
    )
    for record in records.requests:
        if record.first_token_at is not None:
            assert record.scheduled_at is not None
            assert record.arrived_at < record.scheduled_at <= record.first_token_at
    stats = engine.stats()
    assert stats.prompt_tokens_total == sum(len(by_id[name].prompt_token_ids) for name in first)
    assert stats.generation_tokens_total == sum(counts.values())
    assert stats.finished_total == {reason: [end for end, _ in ends.values()].count(reason) for reason in FinishReason}


def recorded_intervals(steps: list[StepRecord]) -> Counter[float]:
    total: dict[float, int] = defaultdict(int)
    for step in steps:
        for seconds, count in step.token_intervals:
            total[seconds] += count
    return Counter(total)


def phases(record: RequestRecord) -> tuple[int, int, float, float]:
    assert record.first_token_at is not None and record.last_token_at is not None
    return record.num_prompt_tokens, record.num_generation_tokens, record.first_token_at, record.last_token_at


def test_records_nobody_takes_are_bounded_and_counted() -> None:
    recorder = Recorder(limit=3)
    adders: list[Callable[[], None]] = [
        lambda: recorder.add_step(StepRecord(1, [], [])),
        lambda: recorder.add_cancel(0.5),
    ]
    for add in adders:
        for _ in range(5):
            add()
    records = recorder.take()
    assert (len(records.steps), len(records.cancel_seconds), records.num_lost) == (3, 3, 4)
    recorder.add_cancel(0.5)
    assert recorder.take().num_lost == 0
