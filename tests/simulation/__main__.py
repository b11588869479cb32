"""Simulate many seeds, or see one again.

Usage: python -m tests.simulation [--first N] [--seeds N] [--seconds S] [--record]
       python -m tests.simulation --seed N [--only 0,3]

Without --seed: simulate seeds from --first on until so many have been simulated or so many seconds are over. The first one that
fails is made as small as it gets and shown with the command that shows it again; the exit status is then 1. --record writes
benchmarks/results/sim.json from what has been done, also while it goes on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback

from benchmarks import report
from tests.simulation.shrink import Failure, run_seed, shrink
from tests.simulation.tally import Tally, simulate_seeds

GOAL_SEEDS = 1_000_000
GOAL_STEPS_PER_SECOND = 1000
SECONDS_BETWEEN_RECORDS = 60


def show(failure: Failure) -> None:
    """A failing scenario, its error, and how to see it again."""
    print(f"seed {failure.seed} fails; of its events, these are needed:")
    print(failure.scenario.setup)
    for event in failure.scenario.events:
        print(event)
    traceback.print_exception(failure.error, file=sys.stdout)
    print(f"again: {failure.command}")


def record(first: int, tally: Tally, seconds: float, commit: str) -> None:
    """Write benchmarks/results/sim.json."""
    rows = [
        report.row(name, value, unit, "goal", goal, higher_is_better=True)
        for name, value, unit, goal in (
            ("clean seeds", tally.num_seeds, "seeds", GOAL_SEEDS),
            ("steps", tally.num_steps, "steps", 10 * GOAL_SEEDS),
            ("steps per second, one process", tally.num_steps / seconds, "1/s", GOAL_STEPS_PER_SECOND),
            ("requests accepted", tally.num_requests, "requests", 2 * GOAL_SEEDS),
            ("preemptions", tally.num_preemptions, "groups", GOAL_SEEDS / 10),
            ("blocks swapped back in", tally.num_swapped_blocks, "blocks", GOAL_SEEDS / 10),
            ("prompt tokens found in the prefix cache", tally.num_prefix_hits, "tokens", GOAL_SEEDS),
        )
    ]
    notes = (
        f"seeds from {first} on; every invariant looked at after every turn of the engine's loop; not one seed failed"
    )
    report.write("sim", rows, notes, measured=report.source(commit))


def run_many(first: int, num_seeds: int, seconds: float, *, wants_record: bool) -> int:
    """Returns the exit status."""
    commit = report.current_commit()  # of the code that is loaded now
    tally, begin = Tally(), time.perf_counter()
    while tally.num_seeds < num_seeds and (left := begin + seconds - time.perf_counter()) > 0:
        count = num_seeds - tally.num_seeds
        part, failure = simulate_seeds(first + tally.num_seeds, count, min(left, SECONDS_BETWEEN_RECORDS))
        tally += part
        if failure is not None:
            show(shrink(failure))
            return 1
        print(f"{tally.num_seeds} seeds, {tally.num_steps} steps", flush=True)
        if wants_record:
            record(first, tally, time.perf_counter() - begin, commit)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=100_000, help="how many seeds")
    parser.add_argument("--seconds", type=float, default=86_400.0, help="stop after so many seconds")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/sim.json")
    parser.add_argument("--seed", type=int, help="simulate this seed only, and say what it does")
    parser.add_argument("--only", help="of that seed, only the events of these numbers, separated by commas")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # of the engine: the failures are planned
    if arguments.seed is None:
        return run_many(arguments.first, arguments.seeds, arguments.seconds, wants_record=arguments.record)
    kept = None
    if arguments.only is not None:
        kept = tuple(int(number) for number in arguments.only.split(",") if number)
    outcome = run_seed(arguments.seed, kept)
    if isinstance(outcome, Failure):
        show(outcome)
        return 1
    print(f"seed {arguments.seed}: nothing is wrong. {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
