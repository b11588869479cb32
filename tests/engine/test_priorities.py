"""Priorities and tenants in the scheduler: who is admitted and preempted, and that tokens never depend on it."""

from __future__ import annotations

import random

import pytest

from pagedcore.engine.engine import Engine
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from tests.engine.group_runs import Run, expected_outputs, make_mixed_requests, start
from tests.engine.test_schedule_invariance import make_engine


def request(name: str, *, priority: int = 0, tenant: str = "", prompt: int = 8, output: int = 8) -> Request:
    params = SamplingParams(temperature=0, seed=0, max_tokens=output, ignore_eos=True, priority=priority, tenant=tenant)
    return Request(name, [len(name) + number for number in range(prompt)], params)


def steps(run: Run, count: int) -> None:
    for _ in range(count):
        run.take(run.engine.step())


def running(engine: Engine) -> list[str]:
    return [group.request_id for group in engine.scheduler.running]


def preempted(engine: Engine) -> list[str]:
    return [group.request_id for group in engine.scheduler.preempted]


def test_the_more_urgent_goes_first_and_equals_by_arrival() -> None:
    run = start(max_num_seqs=1)
    run.add(request("running", priority=-9))
    steps(run, 2)
    run.add(*[request(f"{priority}{number}", priority=priority) for number in range(2) for priority in (7, 0, -2)])
    order: list[str] = []
    while run.engine.has_work():
        run.take(run.engine.step())
        order += [name for name in running(run.engine) if name not in order]
    assert order == ["running", "-20", "-21", "00", "01", "70", "71"]


def test_the_last_of_the_least_urgent_gives_way_when_rows_run_out() -> None:
    run = start(max_num_seqs=3)
    requests = [request("a", priority=5), request("b", priority=1), request("c", priority=5)]
    for each in requests:
        run.add(each)
        steps(run, 1)
    run.add(equal := request("equal", priority=5))
    steps(run, 1)
    assert running(run.engine) == ["b", "a", "c"] and not preempted(run.engine)
    run.add(urgent := request("urgent", priority=1))
    steps(run, 1)
    assert running(run.engine) == ["b", "urgent", "a"] and preempted(run.engine) == ["c"]
    run.to_the_end()
    assert run.outputs == expected_outputs([*requests, equal, urgent])
    assert run.engine.stats().preemptions_total == 1


def test_no_more_give_way_than_the_blocks_need() -> None:
    run = start(num_blocks=24, block_size=4, max_num_seqs=8)
    requests = [request(f"r{number}", priority=1, prompt=18, output=12) for number in range(4)]
    run.add(*requests)
    steps(run, 6)
    assert len(running(run.engine)) == 4
    run.add(urgent := request("urgent", prompt=30, output=4))
    steps(run, 1)
    assert running(run.engine)[0] == "urgent"
    assert preempted(run.engine) in (["r3"], ["r2", "r3"])
    run.to_the_end()
    assert run.outputs == expected_outputs([*requests, urgent])


def test_nobody_gives_way_for_a_request_that_it_would_not_help() -> None:
    run = start(num_blocks=24, block_size=4, max_num_seqs=8)
    requests = [request("most", prompt=60, output=20), request("little", priority=9, prompt=8, output=30)]
    run.add(*requests)
    steps(run, 4)
    run.add(large := request("large", priority=3, prompt=60, output=4))
    steps(run, 4)
    assert running(run.engine) == ["most", "little"] and not preempted(run.engine)
    run.to_the_end()
    assert run.outputs == expected_outputs([*requests, large])


def test_a_flood_of_one_tenant_does_not_delay_another() -> None:
    run = start(max_num_seqs=2)
    run.add(*[request(f"flood{number}", tenant="a") for number in range(20)])
    steps(run, 12)
    before = len([name for name, messages in run.messages.items() if messages])
    run.add(request("other", tenant="b"))
    while not run.messages["other"]:
        steps(run, 1)
    assert len([name for name, messages in run.messages.items() if messages]) - before <= 3
    run.to_the_end()


def test_output_tokens_count_for_their_tenant() -> None:
    """Equal prompts, but one tenant's outputs are nine times as long: about as many of the other's requests go first."""
    run = start(max_num_seqs=1)
    run.add(*[request(f"long{number}", tenant="a", prompt=2, output=36) for number in range(4)])
    run.add(*[request(f"short{number}", tenant="b", prompt=2, output=4) for number in range(30)])
    while len([name for name in run.messages if ended(run, name)]) < 20:
        steps(run, 1)
    assert len([name for name in run.messages if ended(run, name) and name.startswith("long")]) <= 3
    run.to_the_end()


def ended(run: Run, name: str) -> bool:
    return bool(run.messages[name]) and run.messages[name][-1].request_finished


@pytest.mark.parametrize("num_host_blocks", [0, 200])
@pytest.mark.parametrize(("num_blocks", "budget", "max_num_seqs"), [(40, 24, 24), (38, 13, 13), (128, 32, 5)])
def test_outputs_do_not_depend_on_priorities_and_tenants(
    num_blocks: int, budget: int, max_num_seqs: int, num_host_blocks: int
) -> None:
    preemptions = 0
    for seed in range(4):
        rng = random.Random(seed)
        run = start(
            num_blocks=num_blocks,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            num_host_blocks=num_host_blocks,
        )
        requests = make_mixed_requests(seed, 16)
        arrivals: dict[int, list[Request]] = {}
        for each in requests:
            params = each.sampling_params
            object.__setattr__(params, "priority", rng.choice((0, 0, 1, -3)))
            object.__setattr__(params, "tenant", rng.choice("abc"))
            arrivals.setdefault(rng.choice((0, 0, 3, 20, 60)), []).append(each)
        assert run.to_the_end(arrivals) == expected_outputs(requests)
        preemptions += run.engine.stats().preemptions_total
    assert preemptions > 0


def test_aborting_and_ending_leave_nothing_in_the_queue() -> None:
    engine, _, blocks = make_engine(max_num_seqs=1)
    for number in range(6):
        engine.add_request(request(str(number), tenant=str(number % 2), priority=number % 3))
    engine.step()
    for number in (5, 0, 1):
        assert engine.abort(str(number)) is not None
    while engine.has_work():
        engine.step()
    waiting = engine.scheduler.waiting
    assert (len(waiting), waiting.num_tokens, waiting.peek(), waiting.is_shared) == (0, 0, None, False)
    assert blocks.num_free_blocks == blocks.num_blocks
