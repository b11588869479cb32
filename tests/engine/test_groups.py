"""Several sequences of one prompt: computed once, drawn apart, and the same whatever else the engine does."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence_group import blocks_of_group
from pagedcore.errors import RequestError
from tests.engine.group_runs import TIGHT, Run, expected_outputs, make_mixed_requests, start
from tests.engine.test_schedule_invariance import make_engine

# As TIGHT, with room for all.
ROOMY = [(256, 4, 512, 32), (128, 4, 32, 8)]


@pytest.mark.parametrize("one_step_ahead", [False, True])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize(("num_blocks", "block_size", "budget", "max_num_seqs"), ROOMY + TIGHT)
def test_outputs_do_not_depend_on_the_schedule(
    num_blocks: int, block_size: int, budget: int, max_num_seqs: int, enable_prefix_caching: bool, one_step_ahead: bool
) -> None:
    preemptions = 0
    for seed in range(4):
        run = start(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_prefix_caching=enable_prefix_caching,
            one_step_ahead=one_step_ahead,
        )
        requests = make_mixed_requests(seed, 16)
        arrivals: dict[int, list[Request]] = {}
        for request in requests:
            arrivals.setdefault(random.Random(request.request_id).choice((0, 0, 3, 20, 60)), []).append(request)
        assert run.to_the_end(arrivals) == expected_outputs(requests)
        preemptions += run.engine.stats().preemptions_total
    assert (preemptions > 0) == ((num_blocks, block_size, budget, max_num_seqs) in TIGHT)


def test_the_samples_of_a_prompt_differ_and_come_again_with_the_seed() -> None:
    params = SamplingParams(n=5, temperature=1.0, seed=3, max_tokens=8, ignore_eos=True)
    runs = []
    for _ in range(2):
        run = start()
        run.add(Request("x", list(range(10)), params))
        runs.append(run.to_the_end())
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0].values()}) == 5


@pytest.mark.parametrize(("num_prompt_tokens", "num_copies"), [(21, 3), (24, 0), (4, 0), (1, 3)])
def test_a_prompt_is_computed_once_and_only_its_last_partial_block_is_copied(
    num_prompt_tokens: int, num_copies: int
) -> None:
    engine, executor, blocks = make_engine(num_blocks=64, block_size=4, enable_prefix_caching=False)
    run = Run(engine, blocks)
    run.add(Request("x", list(range(num_prompt_tokens)), SamplingParams(n=4, max_tokens=3, ignore_eos=True)))
    used = []
    while engine.has_work():
        run.take(engine.step())
        used.append(blocks.num_blocks - blocks.num_free_blocks)
    assert sum(executor.num_tokens) == num_prompt_tokens + 4 * 2
    assert sum(executor.num_copies) == num_copies
    full = num_prompt_tokens // 4
    assert max(used) == full + 4 * (blocks.blocks_needed(num_prompt_tokens + 2) - full), "the full blocks are shared"


def test_a_beam_copies_one_block_a_step_at_most_and_dead_beams_hold_none() -> None:
    engine, executor, blocks = make_engine(num_blocks=128, block_size=4, enable_prefix_caching=False)
    run = Run(engine, blocks)
    params = SamplingParams(temperature=0, beam_width=6, max_tokens=40, ignore_eos=True)
    run.add(Request("x", list(range(21)), params))
    while engine.has_work():
        run.take(engine.step())
        blocks.check_integrity()
        length = 21 + len(executor.num_rows)
        assert blocks.num_blocks - blocks.num_free_blocks <= blocks.blocks_needed(21) + 6 * blocks.blocks_needed(
            length - 20
        )
    assert all(copies < rows for copies, rows in zip(executor.num_copies, executor.num_rows, strict=True))
    assert sum(executor.num_copies) > 0
    assert sum(executor.num_tokens) == 21 + 6 * 39, "beams are forked, not computed again"


def test_a_beam_search_is_admitted_only_where_its_beams_can_part() -> None:
    """Its prompt of 9 tokens is 3 blocks, and its 4 beams write to a last block each, one of them to the prompt's."""
    params = SamplingParams(temperature=0, beam_width=4, max_tokens=10, ignore_eos=True)
    for num_blocks, fits in ((7 + 5, False), (7 + 6, True)):
        run = start(num_blocks=num_blocks, one_step_ahead=False, enable_prefix_caching=False)
        run.add(Request("first", [7] * 24, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)))
        run.take(run.engine.step())
        assert run.blocks.num_free_blocks == num_blocks - 6
        run.take(run.engine.step())
        run.add(Request("beams", [9] * 9, replace(params, max_tokens=2)))
        run.take(run.engine.step())
        assert (len(run.engine.scheduler.running) == 2) == fits
        run.to_the_end()
        assert run.engine.stats().preemptions_total == 0


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([1], {"n": 9}, r"n, best_of and beam_width must be at most 8 \(max_num_seqs\), got 9"),
        (
            [1] * 10,
            {"best_of": 8, "max_tokens": 9},
            r"with 8 times up to 9 more needs 26 KV-cache blocks .* pool has 16",
        ),
        ([1] * 10, {"beam_width": 8, "temperature": 0, "max_tokens": 9}, r"needs 26 KV-cache blocks"),
    ],
)
def test_groups_that_can_never_run_are_refused_with_numbers(
    prompt: list[int], params: dict[str, Any], message: str
) -> None:
    engine, _, _ = make_engine(num_blocks=16)
    with pytest.raises(RequestError, match=message):
        engine.add_request(Request("x", prompt, SamplingParams(**params)))
    assert not engine.has_work()


def test_a_group_that_needs_the_whole_pool_runs() -> None:
    run = start(num_blocks=27)
    request = Request("x", [1] * 12, SamplingParams(n=8, seed=0, max_tokens=12, ignore_eos=True))
    assert blocks_of_group(run.blocks, 12, 24, 8) == run.blocks.num_blocks
    others = [Request(f"other{i}", [i] * 9, SamplingParams(seed=i, n=2, max_tokens=12)) for i in range(4)]
    run.add(*others, request)
    assert run.to_the_end() == expected_outputs([*others, request])
