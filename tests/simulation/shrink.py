"""Makes a failing scenario small: leaves out events as long as it still fails in the same way."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.simulation.failure import SimulationError
from tests.simulation.scenario import Scenario, make_scenario
from tests.simulation.simulator import Summary, simulate


@dataclass(frozen=True)
class Failure:
    """A scenario of a seed, of which the events `kept` are left, and what it fails with."""

    seed: int
    kept: tuple[int, ...]
    error: BaseException

    @property
    def scenario(self) -> Scenario:
        return make_scenario(self.seed).only(frozenset(self.kept))

    @property
    def command(self) -> str:
        """What to type to see it again."""
        kept = ",".join(map(str, self.kept))
        return f"python -m tests.simulation --seed {self.seed} --only '{kept}'"


def run_seed(seed: int, kept: tuple[int, ...] | None = None) -> Summary | Failure:
    """Simulate a seed with all of its events, or some."""
    scenario = make_scenario(seed)
    if kept is None:
        kept = tuple(range(len(scenario.events)))
    try:
        return simulate(scenario.only(frozenset(kept)))
    except (Exception, SimulationError) as error:  # whatever it is, it is what was looked for
        return Failure(seed, kept, error)


def shrink(failure: Failure) -> Failure:
    """Leave out events, in halves, quarters, ... and one by one, until none can be spared (delta debugging, Zeller 1999)."""
    kind = _kind(failure.error)
    size = max(len(failure.kept) // 2, 1)
    while True:
        smaller = _first_smaller(failure, kind, size)
        if smaller is not None:
            failure = smaller
        elif size == 1:
            return failure
        size = max(min(size, len(failure.kept)) // 2, 1) if smaller is None else min(size, max(len(failure.kept), 1))


def _first_smaller(failure: Failure, kind: str, size: int) -> Failure | None:
    for begin in range(0, len(failure.kept), size):
        found = run_seed(failure.seed, failure.kept[:begin] + failure.kept[begin + size :])
        if isinstance(found, Failure) and _kind(found.error) == kind:
            return found
    return None


def _kind(error: BaseException) -> str:
    """What failures have in common that are taken for the same: everything but the numbers and lists in the text."""
    return type(error).__name__ + re.sub(r"\[[^\]]*\]|[0-9]+", "", str(error))
