"""A slice of `make sim`, and what it says of a fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.shrink import Failure, run_seed, shrink
from tests.simulation.tally import simulate_seeds
from tests.simulation.watched_blocks import WatchedBlocks

ROOT = Path(__file__).resolve().parents[2]
NUM_SEEDS = 2500


def test_seeds_are_clean_and_go_through_what_is_to_be_tested() -> None:
    tally, failure = simulate_seeds(0, NUM_SEEDS)
    assert failure is None, f"{failure.error!r}; again: {failure.command}"
    assert tally.num_seeds == NUM_SEEDS
    assert tally.num_steps > 5 * NUM_SEEDS
    assert min(tally.num_preemptions, tally.num_swapped_blocks, tally.num_prefix_hits) > 0.1 * NUM_SEEDS


def test_a_seed_is_for_ever_the_same() -> None:
    assert [run_seed(seed) for seed in range(40)] == [run_seed(seed) for seed in range(40)]


def test_a_failing_seed_shrinks_to_the_events_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    swap_in = WatchedBlocks.swap_in

    def lose_the_last_block(blocks: WatchedBlocks, seq_ids: list[int]) -> list[tuple[int, int]] | None:
        pairs = swap_in(blocks, seq_ids)
        return None if pairs is None else pairs[:-1]

    monkeypatch.setattr(WatchedBlocks, "swap_in", lose_the_last_block)
    _, failure = simulate_seeds(0, NUM_SEEDS)
    assert failure is not None
    smallest = shrink(failure)
    assert 0 < len(smallest.kept) < len(failure.kept)
    for spared in smallest.kept:
        left = tuple(number for number in smallest.kept if number != spared)
        outcome = run_seed(smallest.seed, left)
        assert not isinstance(outcome, Failure) or str(outcome.error) != str(smallest.error)


def test_the_command_line_replays_a_seed() -> None:
    command = [sys.executable, *Failure(11, (0, 1), ValueError()).command.replace("'", "").split()[1:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.partition(".")[0]) == (0, "seed 11: nothing is wrong")
