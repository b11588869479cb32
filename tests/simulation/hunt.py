"""Plants every mutant in turn and simulates seeds until one fails.

Usage: python -m tests.simulation.hunt [--record]

Prints a line for each mutant: how many seeds it took, and what was found. --record begins with the first seed for every mutant, not
near one that finds it, and writes benchmarks/results/mutants.json. The exit status is 1 if one was not found. This process runs on
a block manager that has been built anew, with the native mutants in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from tests.simulation.mutants import PYTHON_MUTANTS, Mutant
from tests.simulation.native_mutants import NATIVE_MUTANTS
from tests.simulation.planting import NativeMutants, planted

MAX_SEEDS = 10000  # for a mutant to be found in
MAX_SECONDS = 10.0  # for a seed, which takes milliseconds unless the mutant goes round in circles


@dataclass(frozen=True)
class Catch:
    """How a mutant was found: after how many seeds, by what. `error` is empty where it was not."""

    mutant: Mutant
    num_seeds: int
    error: str


def use_module(path: Path) -> None:
    """Let pagedcore._core be this build, for what is imported from now on."""
    name = "pagedcore._core"
    assert name not in sys.modules
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def hunt_all(native: NativeMutants, *, begins_near: bool) -> Iterator[Catch]:
    """Every mutant's catch."""
    for mutant in PYTHON_MUTANTS:
        yield _hunt_in(planted(mutant), mutant, mutant.near if begins_near else 0)
    for mutant in NATIVE_MUTANTS:
        yield _hunt_in(native.planted(mutant), mutant, mutant.near if begins_near else 0)


def _hunt_in(context: AbstractContextManager[None], mutant: Mutant, first: int) -> Catch:
    """Simulate seeds from `first` on until one fails."""
    from tests.simulation.shrink import Failure, run_seed  # behind use_module

    with context:
        for number in range(MAX_SEEDS):
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
            outcome = run_seed(first + number)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if isinstance(outcome, Failure):
                return Catch(mutant, number + 1, f"{type(outcome.error).__name__}: {outcome.error}")
    return Catch(mutant, MAX_SEEDS, "")


def _give_up(_signal: int, _frame: object) -> None:
    from tests.simulation.failure import SimulationError  # behind use_module

    raise SimulationError(f"a seed takes more than {MAX_SECONDS:.0f} s")


def record(catches: list[Catch]) -> None:
    """Write benchmarks/results/mutants.json: seeds until a mutant was found, against how many it had."""
    rows = [
        report.row(catch.mutant.what, catch.num_seeds, "seeds", "limit", MAX_SEEDS, higher_is_better=False)
        for catch in catches
    ]
    report.write("mutants", rows, f"{len(rows)} mutants, each planted alone; seeds simulated until one failed")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation.hunt", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/mutants.json")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _give_up)
    with tempfile.TemporaryDirectory() as folder:
        native = NativeMutants(Path(folder))
        use_module(native.path)
        catches = []
        for catch in hunt_all(native, begins_near=not arguments.record):
            print(f"{catch.num_seeds:5d}  {catch.mutant.what}  [{catch.error[:100] or 'NOT FOUND'}]", flush=True)
            catches.append(catch)
    if arguments.record:
        record(catches)
    return int(not all(catch.error for catch in catches))


if __name__ == "__main__":
    sys.exit(main())
