"""Simulated runs by the dozen: rate sweeps, spread over the machine's cores."""

from __future__ import annotations

import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from benchmarks.paper.simulator import SimulationConfig, SimulationResult, simulate
from benchmarks.paper.workloads import Trace

POLICIES = ("paged", "orca_oracle", "orca_pow2", "orca_max", "static_batch")
LABELS = {
    "paged": "pagedcore",
    "orca_oracle": "Orca (Oracle)",
    "orca_pow2": "Orca (Pow2)",
    "orca_max": "Orca (Max)",
    "static_batch": "FasterTransformer",
}


@dataclass(frozen=True)
class Sweep:
    """One system under a trace at rising rates (requests/s), up to the first rate it cannot sustain.

    That is one whose normalized latency exceeds `latency_limit` (s/token). `seconds`: length of the trace; a run is given up
    when it takes three times as long.
    """

    config: SimulationConfig
    trace: Trace
    rates: tuple[float, ...]
    seconds: float
    latency_limit: float = math.inf


@dataclass(frozen=True)
class Point:
    rate: float
    result: SimulationResult


def run_sweep(sweep: Sweep) -> list[Point]:
    """The points up to the first that exceeds the limit, that one included."""
    config = replace(
        sweep.config,
        measure_from=sweep.seconds / 6,
        max_seconds=3 * sweep.seconds if sweep.latency_limit < math.inf else sweep.seconds,
    )
    points = []
    for rate in sweep.rates:
        points.append(Point(rate, simulate(config, sweep.trace.build(rate, sweep.seconds))))
        if points[-1].result.normalized_latency > sweep.latency_limit:
            break
    return points


def run_sweeps(sweeps: list[Sweep]) -> list[list[Point]]:
    """Every sweep's points, in the order of the sweeps. Equal ones run once; those that simulate most are begun first."""
    order = sorted(set(sweeps), key=lambda sweep: -sum(sweep.rates) * sweep.seconds)
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        points = dict(zip(order, pool.map(run_sweep, order, chunksize=1), strict=True))
    return [points[sweep] for sweep in sweeps]


def sustained_rate(points: list[Point], latency: float) -> float:
    """The rate at which the normalized latency reaches `latency` s/token, between two points by the logarithm of theirs.

    The last rate if it is never reached. Below the first rate: that rate, scaled by how far beyond the latency it is.
    """
    before: Point | None = None
    for point in points:
        reached = point.result.normalized_latency
        if reached > latency:
            if before is None:
                return point.rate * latency / reached
            if math.isinf(reached):
                return before.rate
            low = before.result.normalized_latency
            share = math.log(latency / low) / math.log(reached / low)
            return before.rate + share * (point.rate - before.rate)
        before = point
    assert before is not None
    return before.rate
