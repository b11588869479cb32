"""A discrete-event run: the real engine, scheduler and block manager, with a clock in place of a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.paper.memory_use import MemoryUse, anyone_waits, measure, output_len
from benchmarks.paper.step_time import StepTime
from benchmarks.paper.workloads import END_TOKEN, FILLER_TOKEN, MAX_MODEL_LEN, TraceRequest
from pagedcore.engine.engine import Engine, EngineLimits
from pagedcore.engine.executor import KVCacheShape
from pagedcore.engine.memory_policy import MemoryPolicy
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.step_plan import Int32Array, StepLayout, StepPlan, StepResult
from pagedcore.engine.step_sizes import NO_PADDING

_VOCAB_SIZE = 2**31 - 1


@dataclass(frozen=True)
class SimulationConfig:
    """`max_seconds`: when the clock gets there, the run is given up. `measure_from`: when the means begin."""

    policy: str
    step_time: StepTime
    num_slots: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = False
    measure_from: float = 0.0
    max_seconds: float = float("inf")


@dataclass(frozen=True)
class SimulationResult:
    """What a run came to. Means are over the steps between `measure_from` and the last arrival.

    normalized_latency: mean over requests of (seconds from arrival to end) / (output length), in s/token (section 6.1);
    infinite if the run was given up. batched: mean number of running requests a step. saturated: share of the time in which
    a request waited. memory: mean slots (all zero where blocks are shared). peak_slots: the most slots that were taken.
    """

    normalized_latency: float
    batched: float
    saturated: float
    memory: MemoryUse
    peak_slots: int
    output_tokens_per_second: float
    preemptions: int
    prefix_hit_rate: float
    seconds: float


class _Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class Recorder:
    """Sums over the steps in a window of the clock. It looks at a step when it is planned and nothing of it is committed."""

    def __init__(self, scheduler: Scheduler, begin: float, end: float, *, with_memory: bool) -> None:
        self._scheduler = scheduler
        self._begin, self._end = begin, end
        self._with_memory = with_memory
        self.num_steps = self.num_running = self.num_output_tokens = self.peak_slots = 0
        self.seconds = self.saturated_seconds = 0.0
        self.memory = MemoryUse()

    def record(self, plan: StepPlan, clock: float, step_seconds: float) -> None:
        blocks = self._scheduler.blocks
        self.peak_slots = max(self.peak_slots, (blocks.num_blocks - blocks.num_free_blocks) * blocks.block_size)
        if not self._begin <= clock < self._end:
            return
        self.num_steps += 1
        self.num_running += len(self._scheduler.running)
        self.num_output_tokens += sum(plan.samples)
        self.seconds += step_seconds
        self.saturated_seconds += step_seconds * anyone_waits(self._scheduler)
        if self._with_memory:
            self.memory = self.memory.plus(measure(self._scheduler), step_seconds)


class ClockExecutor:
    """Draws the end token when an output is as long as it will be; each step moves the clock on by its modelled time."""

    step_sizes = NO_PADDING

    def __init__(self, config: SimulationConfig) -> None:
        self.kv_cache_shape = KVCacheShape(config.num_slots // config.block_size, 0, config.block_size)
        width = MAX_MODEL_LEN // config.block_size + 1
        size = StepLayout(config.max_num_batched_tokens, config.max_num_seqs, width).copies
        self._buffers = [np.zeros(size, dtype=np.int32) for _ in range(3)]
        self._step_time = config.step_time
        self.clock = 0.0
        self.recorder: Recorder | None = None

    def step_buffers(self) -> list[Int32Array]:
        return self._buffers

    def launch(self, plan: StepPlan) -> _Done:
        num_tokens = sum(plan.num_scheduled_tokens)
        step_seconds = self._step_time.seconds(num_tokens, sum(plan.num_computed_tokens) + num_tokens)
        if self.recorder is not None:
            self.recorder.record(plan, self.clock, step_seconds)
        self.clock += step_seconds
        drawn = [END_TOKEN if seq.num_output_tokens + 1 >= output_len(seq) else FILLER_TOKEN for seq in plan.sequences]
        return _Done(StepResult(np.array(drawn, dtype=np.int32)))

    def shutdown(self) -> None:
        """Nothing to release."""


def build(config: SimulationConfig) -> tuple[Engine, ClockExecutor]:
    """The engine as it serves, but not one step ahead, on a clock."""
    executor = ClockExecutor(config)
    policy = MemoryPolicy(config.policy, MAX_MODEL_LEN)
    blocks = policy.make_blocks(
        executor.kv_cache_shape.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
    )
    limits = SchedulerConfig(config.max_num_seqs, config.max_num_batched_tokens, config.enable_prefix_caching)
    scheduler = Scheduler(limits, blocks, executor.step_buffers(), policy)
    engine_limits = EngineLimits(MAX_MODEL_LEN, _VOCAB_SIZE, 0, frozenset({END_TOKEN}))
    return Engine(scheduler, executor, engine_limits, one_step_ahead=False), executor


class _Unfinished:
    """A request of the trace; it ends with the last of the engine's requests that it became."""

    def __init__(self, request: TraceRequest, num_parts: int) -> None:
        self.request = request
        self.num_left = num_parts

    def normalized_latency(self, now: float) -> float:
        return (now - self.request.arrival) / self.request.output_len


def _engine_requests(request: TraceRequest, name: str, policy: MemoryPolicy) -> list[Request]:
    """One request with all samples where they can share blocks; a request for each sample where not."""
    num_samples, num_requests = (request.num_samples, 1) if policy.is_paged else (1, request.num_samples)
    params = SamplingParams(n=num_samples, max_tokens=None)
    return [
        Request(f"{name}.{part}", request.prompt, params, expected_output_len=request.output_len)
        for part in range(num_requests)
    ]


def simulate(config: SimulationConfig, trace: list[TraceRequest]) -> SimulationResult:
    """Serve a trace, which is in order of arrival, to its end."""
    engine, executor = build(config)
    shares_blocks = config.enable_prefix_caching or any(request.num_samples > 1 for request in trace)
    recorder = Recorder(engine.scheduler, config.measure_from, trace[-1].arrival, with_memory=not shares_blocks)
    executor.recorder = recorder
    unfinished: dict[str, _Unfinished] = {}
    latencies: list[float] = []
    num_arrived = 0
    while (num_arrived < len(trace) or unfinished) and executor.clock < config.max_seconds:
        if not unfinished:
            executor.clock = max(executor.clock, trace[num_arrived].arrival)
        while num_arrived < len(trace) and trace[num_arrived].arrival <= executor.clock:
            parts = _engine_requests(trace[num_arrived], str(num_arrived), engine.scheduler.policy)
            entry = _Unfinished(trace[num_arrived], len(parts))
            for part in parts:
                engine.add_request(part)
                unfinished[part.request_id] = entry
            num_arrived += 1
        for output in engine.step():
            assert output.error is None
            if not output.request_finished:
                continue
            entry = unfinished.pop(output.request_id)
            entry.num_left -= 1
            if entry.num_left == 0:
                latencies.append(entry.normalized_latency(executor.clock))
    stats = engine.stats()
    seconds = max(recorder.seconds, 1e-9)
    return SimulationResult(
        normalized_latency=float(np.mean(latencies)) if len(latencies) == len(trace) else float("inf"),
        batched=recorder.num_running / max(recorder.num_steps, 1),
        saturated=recorder.saturated_seconds / seconds,
        memory=MemoryUse().plus(recorder.memory, 1 / seconds),
        peak_slots=recorder.peak_slots,
        output_tokens_per_second=recorder.num_output_tokens / seconds,
        preemptions=stats.preemptions_total,
        prefix_hit_rate=stats.prefix_cache_hits_total / max(stats.prefix_cache_queries_total, 1),
        seconds=executor.clock,
    )
