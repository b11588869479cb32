"""The paper's experiments: every slot of the pool is accounted for at every step, and the clock counts what it should."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.paper import shapes
from benchmarks.paper.memory_use import MemoryUse, PagedWaste, anyone_waits, measure, measure_waste
from benchmarks.paper.runs import Point, sustained_rate
from benchmarks.paper.simulator import Sharing, SimulationConfig, SimulationResult, build, simulate
from benchmarks.paper.step_time import (
    A100_40GB,
    OPT_13B,
    OPT_66B,
    Efficiency,
    Observation,
    StepTime,
    fit_efficiency,
    observe,
    paper_system,
    step_time,
)
from benchmarks.paper.workloads import (
    ALPACA,
    SHAREGPT,
    ChatTrace,
    LogNormalLengths,
    PlainTrace,
    SharedPrefixTrace,
    TraceRequest,
)
from pagedcore.config import KV_POLICIES
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.scheduler import Scheduler

TIME = StepTime(0.01, 0.001, 0.00001)
LENGTHS = LogNormalLengths("short", 80.0, 60.0, prompt_sigma=1.0, output_sigma=0.8)


def use_slot_by_slot(scheduler: Scheduler) -> MemoryUse:
    """What `measure` says, by looking at each slot of each block that a sequence has, and at each block that none has."""
    blocks, policy = scheduler.blocks, scheduler.policy
    counts = {"token_states": 0, "reserved": 0, "internal": 0, "external": 0}
    owned: set[int] = set()
    for seq in [seq for group in scheduler.running for seq in group.sequences]:
        table = blocks.block_table(seq.seq_id)
        owned.update(table)
        asked_for = len(table) * blocks.block_size if policy.is_paged else policy.tokens_to_hold(seq)
        expected = seq.request.expected_output_len
        assert expected is not None
        for slot in range(len(table) * blocks.block_size):
            if slot < seq.num_computed_tokens:
                counts["token_states"] += 1
            elif slot >= asked_for:
                counts["external"] += 1
            elif slot < seq.num_prompt_tokens + expected:
                counts["reserved"] += 1
            else:
                counts["internal"] += 1
    free = (blocks.num_blocks - len(owned)) * blocks.block_size
    assert free == blocks.num_free_blocks * blocks.block_size, "no block is in two tables"
    waits = len(scheduler.waiting) + len(scheduler.preempted) > 0
    counts["external"] += free if waits else 0
    return MemoryUse(**counts, idle=0 if waits else free)


def check_waste(scheduler: Scheduler, waste: PagedWaste, use: MemoryUse) -> None:
    """The causes add up to the waste, and what is free beyond the margin really is too little for who waits."""
    blocks = scheduler.blocks
    assert waste.last_block + waste.ahead == use.reserved + use.internal
    assert waste.margin + waste.returning + waste.new == use.external
    tables = [len(blocks.block_table(seq.seq_id)) for group in scheduler.running for seq in group.sequences]
    assert waste.last_block <= 15 * len(tables)
    assert waste.margin <= 0.01 * blocks.num_blocks * 16
    assert waste.returning == 0 or scheduler.preempted
    assert waste.new == 0 or not scheduler.preempted


def test_preempted_requests_find_their_kv_again() -> None:
    """The second of two equal requests loses its 65 blocks after 41 steps of 1 s, when the first one needs a 66th.

    The first one grows by four of them to its end after 100 steps, and the others are found again then; 59 steps are left.
    """
    trace = [TraceRequest(0.0, [2 + number] * 1000, 100) for number in range(2)] + [TraceRequest(500.0, [9], 1)]
    config = SimulationConfig("paged", StepTime(1.0, 0.0, 0.0), num_slots=130 * 16)
    assert simulate(config, trace).revived_slots == 0
    result = simulate(replace(config, enable_prefix_caching=True), trace)
    assert result.preemptions == 1
    assert result.revived_slots == pytest.approx((65 - 4) * 16 * (100 - 41) / 159)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_every_slot_is_accounted_for_at_every_step(policy: str) -> None:
    config = SimulationConfig(policy, TIME, num_slots=2_500, max_num_seqs=20, max_num_batched_tokens=128)
    engine, executor = build(config)
    trace = PlainTrace(LENGTHS).build(rate=3.0, seconds=12.0)
    for number, request in enumerate(trace):
        params = SamplingParams(temperature=0, max_tokens=None)
        engine.add_request(Request(str(number), request.prompt, params, expected_output_len=request.output_len))
    scheduler = engine.scheduler
    num_tokens, saturated, steps = 0, 0, 0
    while engine.has_work():
        plan = scheduler.schedule()
        assert plan is not None
        use = measure(scheduler)
        assert use == use_slot_by_slot(scheduler)
        assert use.total == config.num_slots // 16 * 16
        if policy == "paged":
            check_waste(scheduler, measure_waste(scheduler), use)
        scheduler.blocks.check_integrity()
        saturated += anyone_waits(scheduler)
        steps += 1
        num_tokens += sum(plan.samples)
        for output in scheduler.commit(plan, executor.launch(plan).wait()):
            if output.finish_reason is not None:
                assert output.error is None
    assert num_tokens == sum(request.output_len for request in trace)
    assert 0 < saturated < steps


def test_the_clock_of_a_request_alone() -> None:
    """A prompt in chunks of 64, then a step for each token after the first."""
    config = SimulationConfig("paged", TIME, num_slots=4_096, max_num_seqs=4, max_num_batched_tokens=64)
    result = simulate(config, [TraceRequest(2.0, [1] * 100, 5)])
    steps = [(64, 64), (36, 100), (1, 101), (1, 102), (1, 103), (1, 104)]
    seconds = sum(0.01 + 0.001 * tokens + 0.00001 * context for tokens, context in steps)
    assert result.seconds == pytest.approx(2.0 + seconds)
    assert result.normalized_latency == pytest.approx(seconds / 5)


def test_a_request_with_samples_ends_with_the_last_of_them() -> None:
    """Reserved apart, two samples run and then the third; with shared blocks they run together or not at all."""
    trace = [TraceRequest(0.0, [1] * 8, 4, num_samples=3)]
    config = SimulationConfig("orca_oracle", StepTime(1.0, 0.0, 0.0), num_slots=8_192, max_num_seqs=2)
    result = simulate(config, trace)
    assert (result.seconds, result.normalized_latency) == (8.0, 2.0)
    result = simulate(replace(config, policy="paged", max_num_seqs=3), trace)
    assert (result.seconds, result.normalized_latency) == (4.0, 1.0)


def test_a_run_that_is_given_up_has_no_latency() -> None:
    config = SimulationConfig("orca_max", StepTime(1.0, 0.0, 0.0), num_slots=2_048, max_seconds=10.0)
    trace = [TraceRequest(0.0, [1] * 8, 8), TraceRequest(0.0, [1] * 8, 8)]
    assert simulate(config, trace).normalized_latency == math.inf


def test_more_requests_fit_the_less_is_reserved() -> None:
    trace = PlainTrace(SHAREGPT).build(rate=8.0, seconds=40.0)
    batches = [
        simulate(SimulationConfig(policy, TIME, OPT_13B.num_slots, max_seconds=40.0), trace).batched
        for policy in ("orca_max", "orca_pow2", "orca_oracle", "paged")
    ]
    assert batches == sorted(batches) and 6.5 < batches[0] <= 7.0


def test_the_anatomy_of_figure_3() -> None:
    uses = shapes.anatomy()
    assert uses["A"] == MemoryUse(token_states=8, reserved=2, internal=2038)
    assert uses["B"] == MemoryUse(token_states=4, reserved=1, internal=507)


@pytest.mark.parametrize("source", [SHAREGPT, ALPACA])
def test_sampled_lengths_have_the_paper_s_means(source: LogNormalLengths) -> None:
    drawn = source.sample(50_000, seed=11)
    assert drawn.prompts.mean() == pytest.approx(source.prompt_mean, rel=0.02)
    assert drawn.outputs.mean() == pytest.approx(source.output_mean, rel=0.02)
    assert drawn.prompts.min() >= 1 and drawn.outputs.min() >= 1
    assert (drawn.prompts + drawn.outputs).max() <= 2048
    again = source.sample(50_000, seed=11)
    assert np.array_equal(drawn.outputs, again.outputs)
    assert not np.array_equal(drawn.outputs, source.sample(50_000, seed=12).outputs)


def test_arrivals_are_poisson() -> None:
    arrivals = np.array([request.arrival for request in PlainTrace(ALPACA).build(rate=20.0, seconds=500.0)])
    gaps = np.diff(arrivals)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential: equal


def test_a_shared_prefix_and_a_chat_s_history_are_found_by_the_prefix_cache() -> None:
    config = SimulationConfig("paged", TIME, num_slots=60_000, enable_prefix_caching=True)
    trace = SharedPrefixTrace(ALPACA, prefix_len=64).build(rate=5.0, seconds=20.0)
    assert len({tuple(request.prompt) for request in trace}) == len(trace)
    shared = simulate(config, trace)
    mean_prompt = np.mean([len(request.prompt) for request in trace])
    assert shared.prefix_hit_rate == pytest.approx(64 / mean_prompt, rel=0.05)
    chat = ChatTrace(ALPACA, think_seconds=1.0).build(rate=2.0, seconds=60.0)
    assert max(len(request.prompt) for request in chat) <= 1024
    assert simulate(config, chat).prefix_hit_rate > 0.5
    assert simulate(config, PlainTrace(ALPACA).build(rate=2.0, seconds=60.0)).prefix_hit_rate == 0.0


def test_the_fit_takes_the_observed_time_for_the_observed_steps() -> None:
    observed = [observe(30.42, 2.0, SHAREGPT), observe(132.44, 30.0, ALPACA)]
    time = step_time(OPT_13B, A100_40GB, paper_system())
    for step in observed:
        seconds = time.fixed + time.per_token * step.num_tokens + time.per_context_token * step.num_context_tokens
        assert seconds == pytest.approx(step.seconds)
    assert observed[0].seconds == pytest.approx(30.42 / (2 * 337.99))
    known = Efficiency(weights=0.6, arithmetic=0.4, attention=0.7)
    truth = step_time(OPT_66B, A100_40GB, known)
    pair = [
        Observation(truth.seconds(tokens, context), tokens, context) for tokens, context in ((10, 900), (99, 7_000))
    ]
    fitted = fit_efficiency(OPT_66B, A100_40GB, pair[0], pair[1], attention=0.7)
    assert [fitted.weights, fitted.arithmetic] == pytest.approx([0.6, 0.4])


def test_kv_bytes_are_the_paper_s() -> None:
    assert OPT_13B.kv_bytes_per_token == 800 * 1024  # section 3: 800 KB a token, 1.6 GB for 2048 of them
    assert 2048 * OPT_13B.kv_bytes_per_token == pytest.approx(1.6e9, rel=0.05)


def test_the_sustained_rate_lies_between_the_rates_around_the_latency() -> None:
    def points(*latencies: float) -> list[Point]:
        return [
            Point(float(rate), SimulationResult(latency, 0, 0, MemoryUse(), PagedWaste(), 0, Sharing(), 0, 0, 0, 0, 0))
            for rate, latency in enumerate(latencies, 1)
        ]

    assert sustained_rate(points(0.01, 0.1, 1.0), 0.1) == pytest.approx(2.0)
    assert sustained_rate(points(0.01, 1.0), 0.1) == pytest.approx(1.5)
    assert sustained_rate(points(0.01, 0.05, math.inf), 0.1) == 2.0
    assert sustained_rate(points(0.01, 0.05), 0.1) == 2.0
