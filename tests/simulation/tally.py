"""Many seeds, and what they went through together."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tests.simulation.shrink import Failure, run_seed
from tests.simulation.simulator import Summary


@dataclass(frozen=True)
class Tally:
    """Sums over simulated seeds."""

    num_seeds: int = 0
    num_steps: int = 0
    num_requests: int = 0
    num_preemptions: int = 0
    num_swapped_blocks: int = 0
    num_prefix_hits: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.num_seeds + other.num_seeds,
            self.num_steps + other.num_steps,
            self.num_requests + other.num_requests,
            self.num_preemptions + other.num_preemptions,
            self.num_swapped_blocks + other.num_swapped_blocks,
            self.num_prefix_hits + other.num_prefix_hits,
        )


def simulate_seeds(first: int, count: int, seconds: float = float("inf")) -> tuple[Tally, Failure | None]:
    """Simulate seeds from `first` on, until one fails, `count` are done or the time is over; tells of those that were clean."""
    tally, end = Tally(), time.perf_counter() + seconds
    for seed in range(first, first + count):
        outcome = run_seed(seed)
        if isinstance(outcome, Failure):
            return tally, outcome
        tally += _of_one(outcome)
        if time.perf_counter() > end:
            break
    return tally, None


def _of_one(summary: Summary) -> Tally:
    return Tally(
        1,
        summary.num_steps,
        summary.num_requests,
        summary.num_preemptions,
        summary.num_swapped_blocks,
        summary.num_prefix_hits,
    )
