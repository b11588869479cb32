"""What a tenant waits for its first token while another one floods the engine, with fair sharing and without.

Tenant A sends 200 requests at once, tenant B one every second. Without fair sharing means: both under one tenant's name, so
that all are served in order of arrival. The peer is the engine without fair sharing.

Usage: python benchmarks/engine/fairness.py
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from pagedcore._core import BlockManager
from pagedcore.build import build_engine
from pagedcore.config import EngineConfig
from pagedcore.engine.engine_thread import EngineThread
from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.sequence_group import SequenceGroup
from pagedcore.engine.step_plan import StepResult

NUM_FLOOD, NUM_OTHER, PERIOD_SECONDS = 200, 20, 1.0
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, MAX_NUM_SEQS = 128, 64, 16
NUM_QUEUED, NUM_TENANTS = 10_000, 100


@dataclass
class FirstToken:
    """A sink that keeps the time of the first token and of the end."""

    sent_at: float = 0.0
    first_at: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)

    def push(self, output: TokenOutput) -> None:
        if self.first_at == 0.0:
            self.first_at = time.monotonic()
        if output.request_finished:
            self.ended.set()


def submit(engine: EngineThread, name: str, tenant: str, rng: np.random.Generator) -> FirstToken:
    prompt = rng.integers(0, 40_000, NUM_PROMPT_TOKENS).tolist()
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, tenant=tenant)
    sink = FirstToken(sent_at=time.monotonic())
    engine.submit(Request(name, prompt, params), sink)
    return sink


def flood(engine: EngineThread, other_tenant: str) -> tuple[list[float], float]:
    """Seconds to the first token of each of B's requests, and until all of A's have ended."""
    rng = np.random.default_rng(0)
    begin = time.monotonic()
    flooding = [submit(engine, f"a{number}", "a", rng) for number in range(NUM_FLOOD)]
    others: list[FirstToken] = []
    for number in range(NUM_OTHER):
        time.sleep(max(0.0, begin + (number + 0.5) * PERIOD_SECONDS - time.monotonic()))
        others.append(submit(engine, f"b{number}", other_tenant, rng))
    for sink in (*flooding, *others):
        sink.ended.wait()
    return [sink.first_at - sink.sent_at for sink in others], time.monotonic() - begin


def schedule_with_long_queue(num_queued: int) -> float:
    """Median microseconds of schedule + commit of 256 decoding sequences while others wait, of many tenants."""
    blocks = BlockManager(256 * 64, 16)
    scheduler = Scheduler(SchedulerConfig(256, 8192), blocks, [np.zeros(4 << 20, dtype=np.int32) for _ in range(3)])
    for number in range(256 + num_queued):
        params = SamplingParams(
            max_tokens=900, ignore_eos=True, tenant=str(number % NUM_TENANTS), priority=number // 256
        )
        request = Request(str(number), [number % 50_000] * 64, params)
        scheduler.add(SequenceGroup(Sequence(scheduler.new_seq_id(), request, 964, frozenset(), number)))
    times = []
    for _ in range(300):
        begin = time.perf_counter()
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, StepResult(np.full(len(plan.sequences), 17, dtype=np.int32)))
        times.append(time.perf_counter() - begin)
        assert len(scheduler.waiting) >= num_queued
    return float(np.median(times[50:])) * 1e6


def main() -> None:
    loaded = build_engine(
        EngineConfig("SmolLM2-135M-Instruct", max_num_seqs=MAX_NUM_SEQS, max_model_len=512, enable_prefix_caching=False)
    )
    try:
        apart, seconds_apart = flood(loaded.engine, "b")
        together, seconds_together = flood(loaded.engine, "a")
    finally:
        loaded.shutdown()
    rows = [
        report.row(
            f"time to first token of a tenant beside a flood, p{percentile}",
            float(np.percentile(apart, percentile)),
            "s",
            "no fair sharing",
            float(np.percentile(together, percentile)),
            higher_is_better=False,
        )
        for percentile in (50, 99)
    ]
    rows.append(
        report.row(
            "time until all requests have ended",
            seconds_apart,
            "s",
            "no fair sharing",
            seconds_together,
            higher_is_better=False,
        )
    )
    rows.append(
        report.row(
            f"schedule + commit of 256 sequences, {NUM_QUEUED} requests of {NUM_TENANTS} tenants waiting",
            schedule_with_long_queue(NUM_QUEUED),
            "us",
            "none waiting",
            schedule_with_long_queue(0),
            higher_is_better=False,
        )
    )
    report.write(
        "fairness",
        rows,
        f"SmolLM2-135M, at most {MAX_NUM_SEQS} sequences at once, {NUM_PROMPT_TOKENS} tokens in, {NUM_OUTPUT_TOKENS} out; "
        f"{NUM_FLOOD} requests of one tenant at once, {NUM_OTHER} of another at {PERIOD_SECONDS:g} s intervals",
    )


if __name__ == "__main__":
    main()
