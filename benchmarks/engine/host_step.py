"""Host work of one decode step (schedule, fill the packed buffer, commit) at 256 sequences, without a model.

Usage: python benchmarks/engine/host_step.py
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from pagedcore._core import BlockManager
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.sequence_group import SequenceGroup
from pagedcore.engine.step_plan import StepPlan, StepResult

BUDGET_US = 500.0
BLOCK_SIZE, MAX_MODEL_LEN, STEPS = 16, 4096, 400
NUM_LOGPROBS = 5


# What a row of a step costs more that uses an option; each alone, in every row.
OPTIONS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.1},
    "presence_penalty": {"presence_penalty": 0.5},
    "min_tokens": {"min_tokens": MAX_MODEL_LEN, "stop_token_ids": [0]},
    "logprobs = 5": {"logprobs": NUM_LOGPROBS},
    "128 bad words": {"bad_words": ["stands for one of BAD_WORDS"] * 128},
}
# Token ids of two spellings of each bad word, as many as a request may have: of 1 to 3 tokens, the last of which some draws allow.
BAD_WORDS = tuple((17, word % 20, 100 + word)[word % 3 :] for word in range(256))


def prepare(num_sequences: int, options: Mapping[str, Any]) -> Scheduler:
    """A scheduler whose sequences have all been prefilled: 100 to 1024 prompt tokens each."""
    rng = np.random.default_rng(0)
    blocks = BlockManager(num_sequences * MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE)
    buffers = [np.zeros(4 << 20, dtype=np.int32) for _ in range(3)]
    scheduler = Scheduler(SchedulerConfig(num_sequences, 8192), blocks, buffers)
    sequences: list[Sequence] = []
    for number in range(num_sequences):
        prompt = rng.integers(0, 50_000, int(rng.integers(100, 1025))).tolist()
        params = SamplingParams(temperature=0.6, seed=number, max_tokens=None, ignore_eos=True, **options)
        request = Request(str(number), prompt, params, bad_words=BAD_WORDS if params.bad_words else ())
        sequence = Sequence(number, request, MAX_MODEL_LEN, frozenset(params.stop_token_ids), number)
        sequences.append(sequence)
        scheduler.add(SequenceGroup(sequence))
    while any(sequence.num_tokens - sequence.num_computed_tokens > 1 for sequence in sequences):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, drawn(plan))
    return scheduler


def drawn(plan: StepPlan) -> StepResult:
    rows = len(plan.sequences)
    token_ids = np.full(rows, 17, np.int32)
    if plan.sequences[0].request.sampling_params.logprobs is None:
        return StepResult(token_ids)
    logprobs, ids = np.zeros((rows, NUM_LOGPROBS), np.float32), np.zeros((rows, NUM_LOGPROBS), np.int32)
    return StepResult(token_ids, logprobs[:, 0].copy(), np.ones(rows, np.int32), logprobs, ids)


def measure(num_sequences: int, options: Mapping[str, Any]) -> float:
    """Median microseconds of schedule + commit, one step ahead."""
    scheduler = prepare(num_sequences, options)
    before = scheduler.schedule()
    assert before is not None
    times = []
    gc.collect()
    gc.freeze()
    for _ in range(STEPS):
        result = drawn(before)
        begin = time.perf_counter()
        plan = scheduler.schedule()
        scheduler.commit(before, result)
        times.append(time.perf_counter() - begin)
        assert plan is not None and len(plan.sequences) == num_sequences
        before = plan
    return statistics.median(times) * 1e6


def row(name: str, num_sequences: int, options: Mapping[str, Any]) -> report.Row:
    """The result of one case; the budget is in proportion to the sequences."""
    budget = BUDGET_US * num_sequences / 256
    return report.row(name, measure(num_sequences, options), "us", "budget", budget, higher_is_better=False)


def main() -> None:
    rows = [row(f"schedule + fill + commit, {num} sequences", num, {}) for num in (32, 256)]
    rows += [row(f"256 sequences, {name}", 256, options) for name, options in OPTIONS.items()]
    report.write("host_step", rows, "one core; 100-1024 prompt tokens a sequence, block size 16, one step ahead")


if __name__ == "__main__":
    main()
