"""Pinned prefixes: computed once, never evicted, and not asked for again by those that share them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.errors import RequestError
from tests.engine.group_runs import Run, expected_outputs
from tests.engine.test_schedule_invariance import make_engine


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_pinned_prefixes_are_computed_once_and_never_evicted(enable_prefix_caching: bool) -> None:
    engine, executor, blocks = make_engine(
        num_blocks=64, num_host_blocks=40, enable_prefix_caching=enable_prefix_caching
    )
    prefix, other = list(range(50, 72)), [*range(50, 60), 3, 4]
    engine.pin_prefix(prefix)
    engine.pin_prefix(other)
    pinned = engine.stats().num_pinned_blocks
    assert pinned == (6 + 3 - 2 if enable_prefix_caching else 6 + 3), "10 tokens in common are two whole blocks"
    assert sum(executor.num_tokens) == 22 + (12 - 8 if enable_prefix_caching else 12 - 0)
    run = Run(engine, blocks)
    filler = [Request(f"f{i}", [i + 1] * 30, SamplingParams(seed=i, max_tokens=30, ignore_eos=True)) for i in range(12)]
    run.add(*filler)
    while engine.has_work():
        run.take(engine.step())
    assert engine.stats().prefix_cache_evictions_total > 0 or not enable_prefix_caching
    computed, copies = sum(executor.num_tokens), sum(executor.num_copies)
    group = Request("group", [*prefix, 1, 2, 3], SamplingParams(n=3, seed=9, max_tokens=5, ignore_eos=True))
    shorter = Request("shorter", [*other, 1], SamplingParams(temperature=0, seed=0, max_tokens=5, ignore_eos=True))
    salted = Request("salted", [*other, 1], shorter.sampling_params, cache_salt="tenant")
    run.add(group, shorter, salted)
    while engine.has_work():
        run.take(engine.step())
        blocks.check_integrity()
    assert run.outputs == expected_outputs([*filler, group, shorter, salted])
    assert sum(executor.num_tokens) - computed == (3 + 3 * 4) + (1 + 4) + (13 + 4)
    assert sum(executor.num_copies) - copies == 1 + 2, "the prefix's last block, and the group's"
    assert run.messages["group"][-1].num_cached_tokens == 22
    assert blocks.num_blocks - blocks.num_free_blocks == pinned == engine.stats().num_pinned_blocks


def test_a_prefix_that_does_not_fit_is_refused_and_requests_are_held_to_the_rest() -> None:
    engine, _, _ = make_engine(num_blocks=16)
    with pytest.raises(RequestError, match=r"needs 18 KV-cache blocks of 4 tokens, but the pool has 16"):
        engine.pin_prefix([1] * 70)
    engine.pin_prefix([1] * 40)
    with pytest.raises(RequestError, match=r"needs 7 KV-cache blocks of 4 tokens, but the pool has 6 beside 10 pinned"):
        engine.add_request(Request("x", [1] * 20, SamplingParams(max_tokens=6)))


@pytest.mark.parametrize("one_step_ahead", [False, True])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("num_host_blocks", [0, 64])
@pytest.mark.parametrize(("prefix_len", "max_tokens"), [(42, 14), (17, 22)])
def test_what_is_shared_with_a_pinned_prefix_is_not_asked_for_again(
    prefix_len: int, max_tokens: int, enable_prefix_caching: bool, one_step_ahead: bool, num_host_blocks: int
) -> None:
    """Two samples share the full blocks of a prefix that is pinned, and the pool has just enough beside those.

    What comes back from the host is theirs alone: in the first case there is no room for that, in the second one too little
    to go on.
    """
    num_shared, num_pinned = prefix_len // 4, prefix_len // 4 + 1
    num_own = -(-(prefix_len + max_tokens) // 4) - num_shared
    num_blocks = num_pinned + 2 * num_own
    engine, _, blocks = make_engine(
        num_blocks=num_blocks,
        enable_prefix_caching=enable_prefix_caching,
        one_step_ahead=one_step_ahead,
        num_host_blocks=num_host_blocks,
    )
    prefix = list(range(prefix_len))
    engine.pin_prefix(prefix)
    run = Run(engine, blocks)
    too_long = SamplingParams(n=2, max_tokens=max_tokens + 4)
    with pytest.raises(RequestError, match=f"but the pool has {num_blocks - 1} beside 1 pinned"):
        engine.add_request(Request("x", [*prefix, 90], too_long))
    with pytest.raises(RequestError, match=f"but the pool has {2 * num_own} beside {num_pinned} pinned"):
        engine.add_request(Request("x", [*prefix, 90], replace(too_long, max_tokens=max_tokens), cache_salt="tenant"))
    requests = [
        Request(f"r{i}", [*prefix, 90 + i], SamplingParams(n=2, seed=i, max_tokens=max_tokens, ignore_eos=True))
        for i in range(3)
    ]
    run.add(*requests)
    for _ in range(1000):
        if not engine.has_work():
            break
        run.take(engine.step())
        blocks.check_integrity()
    assert run.outputs == expected_outputs(requests)
    assert blocks.num_free_blocks == num_blocks - num_pinned
