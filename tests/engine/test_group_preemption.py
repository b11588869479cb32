"""Groups that are preempted: swapped or recomputed whole, and the same afterwards."""

from __future__ import annotations

import pytest

from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.swap_space import PreemptionMode
from tests.engine.group_runs import TIGHT, Run, expected_outputs, make_mixed_requests, start
from tests.engine.test_schedule_invariance import make_engine


@pytest.mark.parametrize("one_step_ahead", [False, True])
@pytest.mark.parametrize("num_host_blocks", [40, 400])
@pytest.mark.parametrize(("num_blocks", "block_size", "budget", "max_num_seqs"), TIGHT)
def test_swapped_requests_go_on_as_if_nothing_had_been(
    num_blocks: int, block_size: int, budget: int, max_num_seqs: int, num_host_blocks: int, one_step_ahead: bool
) -> None:
    swapped_in = 0
    for seed in range(4):
        run = start(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            num_host_blocks=num_host_blocks,
            one_step_ahead=one_step_ahead,
        )
        requests = make_mixed_requests(seed, 16)
        run.add(*requests)
        assert run.to_the_end() == expected_outputs(requests)
        stats = run.engine.stats()
        assert stats.swapped_in_blocks_total <= stats.swapped_out_blocks_total, "what ends on the host stays there"
        swapped_in += stats.swapped_in_blocks_total
    assert swapped_in > 0


def test_the_way_of_preemption_is_chosen_by_cost_or_by_configuration() -> None:
    def swapped_blocks(mode: PreemptionMode, cost: float) -> int:
        run = start(
            num_blocks=40,
            max_num_seqs=24,
            num_host_blocks=100,
            enable_prefix_caching=False,
            preemption_mode=mode,
            swap_cost_tokens=cost,
        )
        requests = make_mixed_requests(1, 16)
        run.add(*requests)
        assert run.to_the_end() == expected_outputs(requests)
        assert run.engine.stats().preemptions_total > 0
        return run.engine.stats().swapped_out_blocks_total

    assert swapped_blocks(PreemptionMode.AUTO, 3.9) > 0, "a block of 4 tokens is moved faster than computed"
    assert swapped_blocks(PreemptionMode.AUTO, 4.1) == 0
    assert swapped_blocks(PreemptionMode.SWAP, 1e9) > 0
    assert swapped_blocks(PreemptionMode.RECOMPUTE, 0) == 0


def test_nothing_is_admitted_while_anything_is_preempted() -> None:
    for mode in (PreemptionMode.SWAP, PreemptionMode.RECOMPUTE):
        run = start(num_blocks=40, max_num_seqs=24, num_host_blocks=100, preemption_mode=mode)
        run.add(*make_mixed_requests(2, 24))
        seen = 0
        while run.engine.has_work():
            before = run.engine.stats()
            run.take(run.engine.step())
            after = run.engine.stats()
            seen += after.num_preempted > 0
            assert not (after.num_preempted and after.num_waiting < before.num_waiting), "admitted past a preempted one"
        assert seen > 0


def test_a_group_is_swapped_and_resumed_whole_and_its_shared_blocks_once() -> None:
    engine, executor, blocks = make_engine(
        num_blocks=24, num_host_blocks=24, enable_prefix_caching=False, max_num_seqs=8
    )
    run = Run(engine, blocks)
    older = Request("older", [1] * 20, SamplingParams(temperature=0, seed=0, max_tokens=30, ignore_eos=True))
    group = Request("group", [2] * 21, SamplingParams(n=4, seed=5, max_tokens=15, ignore_eos=True))
    run.add(older, group)
    sizes = set()
    while engine.has_work():
        run.take(engine.step())
        blocks.check_integrity()
        stats = engine.stats()
        if stats.num_swapped:
            assert (stats.num_running, stats.num_preempted) in ((1, 1), (0, 1))
            sizes.add(stats.num_host_blocks - stats.num_free_host_blocks)
    assert len(sizes) == 1 and sizes.pop() < 5 + 4 * 4, "5 full blocks of the prompt are shared"
    assert run.outputs == expected_outputs([older, group])
    stats = engine.stats()
    assert stats.swapped_out_blocks_total == stats.swapped_in_blocks_total > 0
    assert sum(executor.num_tokens) == 20 + 29 + 21 + 4 * 14, "nothing is computed twice"
