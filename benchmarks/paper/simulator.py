"""A discrete-event run: the real engine, scheduler and block manager, with a clock in place of a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.paper.beam_replay import with_recorded_beams
from benchmarks.paper.memory_use import MemoryUse, PagedWaste, anyone_waits, measure, measure_waste, output_len
from benchmarks.paper.step_time import TimeModel
from benchmarks.paper.workloads import END_TOKEN, FILLER_TOKEN, MAX_MODEL_LEN, TraceRequest
from pagedcore.engine.engine import Engine, EngineLimits
from pagedcore.engine.executor import KVCacheShape
from pagedcore.engine.memory_policy import MemoryPolicy
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.sequence_group import SequenceGroup
from pagedcore.engine.step_plan import Header, Int32Array, StepLayout, StepPlan, StepResult
from pagedcore.engine.step_sizes import NO_PADDING

_VOCAB_SIZE = 2**31 - 1


@dataclass(frozen=True)
class SimulationConfig:
    """`max_seconds`: when the clock gets there, the run is given up. `measure_from`: when the means begin.

    `with_memory`: whether `SimulationResult.memory` and `waste` are wanted; sequences must not share blocks then.
    """

    policy: str
    step_time: TimeModel
    num_slots: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = False
    watermark: float = SchedulerConfig.watermark
    with_memory: bool = False
    measure_from: float = 0.0
    max_seconds: float = float("inf")


@dataclass(frozen=True)
class SimulationResult:
    """What a run came to. Means are over the steps between `measure_from` and the last arrival.

    normalized_latency: mean over requests of (seconds from arrival to end) / (output length), in s/token (section 6.1);
    infinite if the run was given up. batched: mean number of running requests a step. saturated: share of the time in which
    a request waited. memory: mean slots; waste: the paged policy's. revived_slots: mean slots of K/V that preempted requests
    later found again in the prefix cache. sharing: zero where every request has one sequence. peak_slots: the most slots that
    were taken.
    """

    normalized_latency: float
    batched: float
    saturated: float
    memory: MemoryUse
    waste: PagedWaste
    revived_slots: float
    sharing: Sharing
    peak_slots: int
    output_tokens_per_second: float
    preemptions: int
    prefix_hit_rate: float
    seconds: float


@dataclass(frozen=True)
class Sharing:
    """Blocks summed over steps: those used, and those that the same sequences would use if they shared none.

    `num_copies`: blocks copied on a write, in `num_rows` (steps times sequences).
    """

    used: int = 0
    unshared: int = 0
    num_copies: int = 0
    num_rows: int = 0

    @property
    def percent(self) -> float:
        """Blocks saved by sharing / blocks without sharing, in percent (section 6.3)."""
        return 100 * (1 - self.used / self.unshared)


class _Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class Recorder:
    """Sums over the steps in a window of the clock. It looks at a step when it is planned and nothing of it is committed."""

    def __init__(
        self, scheduler: Scheduler, begin: float, end: float, *, with_memory: bool, with_sharing: bool
    ) -> None:
        self._scheduler = scheduler
        self._begin, self._end = begin, end
        self._with_memory, self._with_sharing = with_memory, with_sharing
        self.num_steps = self.num_running = self.num_output_tokens = self.peak_slots = 0
        self.seconds = self.saturated_seconds = self.revived_slot_seconds = 0.0
        self.memory, self.waste = MemoryUse(), PagedWaste()
        self.used = self.unshared = self.num_copies = self.num_rows = 0
        self._preempted_at: dict[SequenceGroup, float] = {}

    def record(self, plan: StepPlan, clock: float, step_seconds: float) -> None:
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        self.peak_slots = max(self.peak_slots, (blocks.num_blocks - blocks.num_free_blocks) * blocks.block_size)
        if not self._begin <= clock < self._end:
            return
        self.num_steps += 1
        self.num_running += len(scheduler.running)
        self.num_output_tokens += sum(plan.samples) + len(plan.beam_rows)
        self.seconds += step_seconds
        self.saturated_seconds += step_seconds * anyone_waits(scheduler)
        if self._with_memory:
            self.memory = self.memory.plus(measure(scheduler), step_seconds)
            if scheduler.policy.is_paged:
                self.waste = self.waste.plus(measure_waste(scheduler), step_seconds)
        self._record_revived(plan, clock)
        if self._with_sharing:
            self._record_sharing(plan)

    def _record_revived(self, plan: StepPlan, clock: float) -> None:
        for group in self._scheduler.preempted:
            self._preempted_at.setdefault(group, clock)
        if self._preempted_at:
            for seq, num_computed in zip(plan.sequences, plan.num_computed_tokens, strict=True):
                since = self._preempted_at.pop(seq.group, clock)
                self.revived_slot_seconds += num_computed * (clock - since)

    def _record_sharing(self, plan: StepPlan) -> None:
        blocks = self._scheduler.blocks
        self.used += blocks.num_blocks - blocks.num_free_blocks
        for group in self._scheduler.running:
            needed = [blocks.blocks_needed(seq.num_computed_tokens) for seq in group.active]
            is_one_for_all = len(needed) == 1 and group.num_ended_tokens == 0
            self.unshared += needed[0] * group.width if is_one_for_all else sum(needed)
        self.num_copies += Header(*plan.buffer[: len(Header._fields)].tolist()).num_copies
        self.num_rows += len(plan.sequences)

    def sharing(self) -> Sharing:
        return Sharing(self.used, self.unshared, self.num_copies, self.num_rows)


class ClockExecutor:
    """Draws the end token when an output is as long as it will be; each step moves the clock on by its modelled time.

    `beam_parents`: of the requests with beams, by id; see `TraceRequest`.
    """

    step_sizes = NO_PADDING

    def __init__(self, config: SimulationConfig) -> None:
        self.kv_cache_shape = KVCacheShape(config.num_slots // config.block_size, 0, config.block_size)
        width = MAX_MODEL_LEN // config.block_size + 1
        size = StepLayout(config.max_num_batched_tokens, config.max_num_seqs, width).copies + 2 * config.max_num_seqs
        self._buffers = [np.zeros(size, dtype=np.int32) for _ in range(3)]
        self._step_time = config.step_time
        self.clock = 0.0
        self.recorder: Recorder | None = None
        self.beam_parents: dict[str, list[list[int]]] = {}

    def step_buffers(self) -> list[Int32Array]:
        return self._buffers

    def launch(self, plan: StepPlan) -> _Done:
        num_tokens = sum(plan.num_scheduled_tokens)
        step_seconds = self._step_time.seconds(num_tokens, sum(plan.num_computed_tokens) + num_tokens)
        if self.recorder is not None:
            self.recorder.record(plan, self.clock, step_seconds)
        self.clock += step_seconds
        drawn = [END_TOKEN if seq.num_output_tokens + 1 >= output_len(seq) else FILLER_TOKEN for seq in plan.sequences]
        token_ids = np.array(drawn, dtype=np.int32)
        if not plan.beam_rows:
            return _Done(StepResult(token_ids))
        return _Done(with_recorded_beams(plan, StepResult(token_ids), self.beam_parents))

    def shutdown(self) -> None:
        """Nothing to release."""


def build(config: SimulationConfig) -> tuple[Engine, ClockExecutor]:
    """The engine as it serves, but not one step ahead, on a clock."""
    executor = ClockExecutor(config)
    policy = MemoryPolicy(config.policy, MAX_MODEL_LEN)
    blocks = policy.make_blocks(
        executor.kv_cache_shape.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
    )
    limits = SchedulerConfig(
        config.max_num_seqs, config.max_num_batched_tokens, config.enable_prefix_caching, watermark=config.watermark
    )
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
    """One request with all samples, or beams, where they can share blocks; a request for each of them where not."""
    if policy.is_paged and request.beam_parents is not None:
        beams = SamplingParams(
            temperature=0, beam_width=request.num_samples, max_tokens=request.output_len, ignore_eos=True
        )
        return [Request(f"{name}.0", request.prompt, beams, expected_output_len=request.output_len)]
    num_samples, num_requests = (request.num_samples, 1) if policy.is_paged else (1, request.num_samples)
    params = SamplingParams(n=num_samples, max_tokens=None)
    return [
        Request(f"{name}.{part}", request.prompt, params, expected_output_len=request.output_len)
        for part in range(num_requests)
    ]


def simulate(config: SimulationConfig, trace: list[TraceRequest]) -> SimulationResult:
    """Serve a trace, which is in order of arrival, to its end."""
    engine, executor = build(config)
    with_sharing = any(request.num_samples > 1 for request in trace)
    end = trace[-1].arrival
    recorder = Recorder(
        engine.scheduler, config.measure_from, end, with_memory=config.with_memory, with_sharing=with_sharing
    )
    executor.recorder = recorder
    unfinished: dict[str, _Unfinished] = {}
    latencies: list[float] = []
    num_arrived = 0
    while (num_arrived < len(trace) or unfinished) and executor.clock < config.max_seconds:
        if not unfinished:
            executor.clock = max(executor.clock, trace[num_arrived].arrival)
        while num_arrived < len(trace) and (request := trace[num_arrived]).arrival <= executor.clock:
            parts = _engine_requests(request, str(num_arrived), engine.scheduler.policy)
            entry = _Unfinished(request, len(parts))
            for part in parts:
                engine.add_request(part)
                unfinished[part.request_id] = entry
                if request.beam_parents is not None:
                    executor.beam_parents[part.request_id] = request.beam_parents
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
        waste=PagedWaste().plus(recorder.waste, 1 / seconds),
        revived_slots=recorder.revived_slot_seconds / seconds,
        sharing=recorder.sharing(),
        peak_slots=recorder.peak_slots,
        output_tokens_per_second=recorder.num_output_tokens / seconds,
        preemptions=stats.preemptions_total,
        prefix_hit_rate=stats.prefix_cache_hits_total / max(stats.prefix_cache_queries_total, 1),
        seconds=executor.clock,
    )
