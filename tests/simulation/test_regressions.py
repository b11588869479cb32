"""Faults of the engine that the simulator found, each as the smallest scenario that shows it."""

from __future__ import annotations

from typing import Any

import pytest

from pagedcore._core import BlockManager
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.sequence_group import SequenceGroup
from pagedcore.engine.step_sizes import NO_PADDING
from pagedcore.engine.swap_space import PreemptionMode, SwapSpace
from tests.simulation.scenario import Arrival, Event, NoRoom, Scenario, Setup, StopBeforeSwap
from tests.simulation.simulator import simulate


def make_setup(**different: Any) -> Setup:
    values: dict[str, Any] = {
        "block_size": 4,
        "num_blocks": 8,
        "num_host_blocks": 0,
        "hash_bits": 64,
        "max_model_len": 24,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 12,
        "step_sizes": NO_PADDING,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "preemption_mode": PreemptionMode.RECOMPUTE,
        "swap_cost_tokens": 0.0,
        "one_step_ahead": True,
        "launches_eagerly": False,
        "max_queue_size": 0,
        "max_queue_tokens": 0,
        "pinned_prefixes": (),
    }
    return Setup(**values | different)


def arrival(
    at: float, name: str, length: int, output: int, priority: int = 0, timeout: float | None = None, n: int = 1
) -> Arrival:
    params = SamplingParams(temperature=0, seed=1, max_tokens=output, ignore_eos=True, priority=priority, n=n)
    prompt = tuple((position * position + len(name)) % 5 + 1 for position in range(length))
    return Arrival(at, name, prompt, params, timeout=timeout)


def preempted_while_on_its_way_back() -> tuple[Setup, list[Event]]:
    """The engine ended: a group was to be swapped out whose blocks were to come in with a step that had not been planned."""
    setup = make_setup(
        block_size=8, num_blocks=3, num_host_blocks=3, max_num_seqs=1, preemption_mode=PreemptionMode.SWAP
    )
    return setup, [arrival(0.0, "yields", 7, 6, 1), arrival(1.5, "a", 9, 3), arrival(6.5, "b", 9, 3)]


def readmitted_in_the_step_that_preempted_it() -> tuple[Setup, list[Event]]:
    """Blocks went into the prefix cache that nothing had been written to: the step that computed their tokens had other ones."""
    return make_setup(), [arrival(0.0, "long", 22, 2, 1), arrival(1.5, "urgent", 8, 3)]


def same_id_after_a_deadline() -> tuple[Setup, list[Event]]:
    """The abort of a request whose deadline had passed ended the next request of the same id."""
    return make_setup(), [arrival(0.0, "x", 5, 9, timeout=2.25), arrival(2.5, "x", 5, 9), arrival(4.5, "x", 5, 9)]


def partly_ended_on_its_way_back() -> tuple[Setup, list[Event]]:
    """Two copies wrote the same block: one of them for a sequence that had ended before the step that was to bring it back."""
    setup = make_setup(num_blocks=10, num_host_blocks=24, max_num_seqs=8, preemption_mode=PreemptionMode.SWAP)
    wide = [arrival(0.0, "wide", 6, 11, 1, n=3), arrival(0.0, "other", 5, 9, 2, n=2)]
    return setup, [*wide, arrival(2.5, "urgent", 16, 3, -1), StopBeforeSwap(0, "wide", 1)]


def beams_dropped_on_their_way_out() -> tuple[Setup, list[Event]]:
    """Two copies wrote the same host block: one of them for a beam dropped before the step that was to take its group out."""
    setup = make_setup(
        block_size=1,
        num_blocks=30,
        num_host_blocks=24,
        max_model_len=10,
        max_num_seqs=8,
        preemption_mode=PreemptionMode.SWAP,
    )
    wide: list[Event] = [
        Arrival(at, f"beams of priority {priority}", prompt, beams(width, output, priority))
        for at, prompt, width, output, priority in (
            (0.0, (3, 2, 2, 3, 3, 3), 2, 4, 1),
            (2.5, (3, 3, 3), 2, 20, 2),
            (4.5, (2, 2, 2), 3, 17, 0),
        )
    ]
    draws = SamplingParams(n=3, temperature=0.8, seed=1, max_tokens=7, ignore_eos=True)
    return setup, [*wide, Arrival(4.5, "draws", (1, 1, 3), draws), NoRoom(10, 2)]


def beams(width: int, output: int, priority: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, beam_width=width, seed=1, max_tokens=output, ignore_eos=True, priority=priority
    )


@pytest.mark.parametrize(
    "case",
    [
        preempted_while_on_its_way_back,
        readmitted_in_the_step_that_preempted_it,
        same_id_after_a_deadline,
        partly_ended_on_its_way_back,
        beams_dropped_on_their_way_out,
    ],
)
def test_what_the_simulator_found_stays_mended(case: Any) -> None:
    setup, events = case()
    summary = simulate(Scenario(0, setup, tuple(events)))
    assert summary.num_steps > 0


def test_nothing_goes_out_behind_what_comes_in_for_the_same_step() -> None:
    blocks = BlockManager(8, 4, num_host_blocks=8)
    swap_space = SwapSpace(blocks, PreemptionMode.SWAP, 0.0)
    params = SamplingParams()
    groups = [SequenceGroup(Sequence(i, Request(str(i), [1] * 8, params), 16, frozenset(), 0)) for i in range(2)]
    for group in groups:
        blocks.add(group.lead.seq_id)
        assert blocks.grow(group.lead.seq_id, 8, 0)
    first, second = groups
    assert swap_space.swap_out(first) and swap_space.take() is not None
    assert swap_space.swap_in(first)
    assert not swap_space.swap_out(second)
    assert swap_space.take() is not None
    assert swap_space.swap_out(second)
