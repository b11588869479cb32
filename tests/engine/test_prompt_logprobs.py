"""Log probabilities of prompts: found once for each token and told once, whatever the schedule, beside a reference without one."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from pagedcore._core import BlockManager
from pagedcore.engine.engine import Engine
from pagedcore.engine.logprobs import PromptLogprobs, TokenLogprobs
from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.step_sizes import NO_PADDING, StepSizes
from pagedcore.engine.swap_space import PreemptionMode
from pagedcore.errors import RequestError
from tests.engine.test_schedule_invariance import VOCAB, make_engine
from tests.reference.fake_model import FakeExecutor, reference_prompt_logprobs

SMALL_POOL: dict[str, Any] = {"num_blocks": 44, "max_num_batched_tokens": 16}
SCHEDULES: dict[str, dict[str, Any]] = {
    "roomy": {"num_blocks": 400, "max_num_batched_tokens": 400},
    "one step at a time": {"num_blocks": 400, "max_num_batched_tokens": 400, "one_step_ahead": False},
    "chunks": {"num_blocks": 400, "max_num_batched_tokens": 7},
    "recomputed": SMALL_POOL,
    "recomputed, no prefix cache": SMALL_POOL | {"enable_prefix_caching": False, "one_step_ahead": False},
    "swapped": SMALL_POOL | {"num_host_blocks": 60, "preemption_mode": PreemptionMode.SWAP},
}


def make_requests(seed: int, count: int) -> list[Request]:
    """Half of them want their prompts' log probabilities; some come in several samples, are urgent, or begin as others do."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    requests = []
    for number in range(count):
        prompt = shared[: rng.choice((0, 7, 16, 24))] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
        n = rng.choice((1, 1, 2, 3))
        params = SamplingParams(
            n=n,
            best_of=n + rng.choice((0, 0, 1)),
            seed=number,
            max_tokens=rng.randint(1, 20),
            prompt_logprobs=rng.choice((None, None, 0, 3)),
            logprobs=rng.choice((None, None, 1)),
            priority=rng.choice((0, 0, -1)),
        )
        requests.append(Request(f"r{number}", prompt, params))
    return requests


class Listener:
    """Steps an engine and keeps what it says of prompts."""

    def __init__(self, engine: Engine, blocks: BlockManager) -> None:
        self.engine = engine
        self.blocks = blocks
        self.told: dict[str, PromptLogprobs] = {}
        self.failed: set[str] = set()
        self._heard_of: set[str] = set()

    def hear(self, output: TokenOutput) -> None:
        name = output.request_id
        self.failed |= {name} if output.error is not None else set()
        if output.prompt_logprobs is not None:
            assert name not in self._heard_of, "with the first output"
            self.told[name] = output.prompt_logprobs
        self._heard_of.add(name)

    def step(self) -> None:
        for output in self.engine.step():
            self.hear(output)
        self.blocks.check_integrity()

    def to_the_end(self) -> None:
        while self.engine.has_work():
            self.step()
        assert self.blocks.num_free_blocks == self.blocks.num_blocks


def expected(request: Request) -> list[TokenLogprobs]:
    """By sorting all tokens."""
    num_top = request.sampling_params.prompt_logprobs
    assert num_top is not None
    positions = []
    rows = reference_prompt_logprobs(request.prompt_token_ids, VOCAB)
    for token, row in zip(request.prompt_token_ids[1:], rows, strict=True):
        order = sorted(range(VOCAB), key=lambda other: -row[other])
        rank = 1 + sum(value > row[token] for value in row)
        positions.append(TokenLogprobs(row[token], rank, order[:num_top], [row[i] for i in order[:num_top]]))
    return positions


def check(listener: Listener, requests: list[Request]) -> None:
    wanting = [r for r in requests if r.sampling_params.prompt_logprobs is not None]
    names = {r.request_id for r in wanting}
    assert names - listener.failed <= set(listener.told) <= names
    for request in wanting:
        if request.request_id in listener.told:
            found = listener.told[request.request_id].positions()
            for ours, theirs in zip(found, expected(request), strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-6)
                assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-6)
                assert (ours.rank, ours.top_token_ids) == (theirs.rank, theirs.top_token_ids)


@pytest.mark.parametrize("name", SCHEDULES)
def test_they_do_not_depend_on_the_schedule(name: str) -> None:
    num_preempted = num_swapped = 0
    for seed in range(3):
        sizes = StepSizes((1, 3, 65), (4, 9, 400), (2, 64)) if seed == 1 else NO_PADDING
        engine, executor, blocks = make_engine(step_sizes=sizes, max_num_seqs=64, **SCHEDULES[name])
        listener = Listener(engine, blocks)
        requests = make_requests(seed, 20)
        for at, request in enumerate(requests):
            engine.add_request(request)
            if at % 3 == 2:
                listener.step()
        listener.to_the_end()
        check(listener, requests)
        assert not listener.failed and max(executor.num_rows) > 2
        num_preempted += engine.stats().preemptions_total
        num_swapped += engine.stats().swapped_in_blocks_total
    assert (num_preempted > 0) == (SCHEDULES[name]["num_blocks"] == SMALL_POOL["num_blocks"])
    assert (num_swapped > 0) == (name == "swapped")


@pytest.mark.parametrize("one_step_ahead", [False, True])
def test_a_prompt_that_is_preempted_halfway_goes_on_where_it_was(one_step_ahead: bool) -> None:
    engine, executor, blocks = make_engine(num_blocks=20, max_num_batched_tokens=10, one_step_ahead=one_step_ahead)
    late = Request("late", list(range(40, 80)), SamplingParams(max_tokens=1, prompt_logprobs=2, priority=1))
    urgent = Request("urgent", list(range(50)), SamplingParams(max_tokens=8, prompt_logprobs=1, priority=0))
    listener = Listener(engine, blocks)
    targets: list[int] = []
    _count_targets(executor, targets)
    engine.add_request(late)
    for _ in range(2):
        listener.step()
    engine.add_request(urgent)
    listener.to_the_end()
    assert engine.stats().preemptions_total == 1
    check(listener, [late, urgent])
    again = 10 if one_step_ahead else 0  # of the chunk that was under way when the group was preempted
    assert 39 + 49 <= sum(targets) <= 39 + 49 + again


def _count_targets(executor: FakeExecutor, targets: list[int]) -> None:
    launch = executor.launch

    def counting(plan: Any) -> Any:
        targets.append(sum(span.end - span.begin for span in plan.prompt_spans))
        return launch(plan)

    counted: Any = executor
    counted.launch = counting


@pytest.mark.parametrize("first", [2, 4])
def test_failed_steps_leave_no_wrong_values_behind(first: int) -> None:
    """The step behind a failed one computed on what that one did not write: what it says of prompts must not count."""
    for kind in ("fail_steps", "broken_steps"):
        engine, executor, blocks = make_engine(num_blocks=200, max_num_batched_tokens=24)
        setattr(executor, kind, {first})
        listener = Listener(engine, blocks)
        requests = make_requests(first, 16)
        for request in requests:
            engine.add_request(request)
        listener.to_the_end()
        assert listener.failed
        check(listener, requests)


@pytest.mark.parametrize("one_step_ahead", [False, True])
def test_a_prompt_fails_where_its_logits_are_not_finite(one_step_ahead: bool) -> None:
    """At once, not when it has been computed to its end; the requests beside it go on."""
    engine, executor, blocks = make_engine(num_blocks=100, max_num_batched_tokens=8, one_step_ahead=one_step_ahead)
    executor.broken_prompts = {1}
    listener = Listener(engine, blocks)
    bad = Request("bad", list(range(60)), SamplingParams(max_tokens=1, prompt_logprobs=1))
    good = Request("good", list(range(40)), SamplingParams(max_tokens=1, prompt_logprobs=1))
    for request in (bad, good):
        engine.add_request(request)
    while engine.has_work() and not listener.failed:
        listener.step()
    assert engine.stats().steps_total == (3 if one_step_ahead else 2)
    listener.to_the_end()
    assert listener.failed == {"bad"} and set(listener.told) == {"good"}
    check(listener, [good])


def test_a_prompt_is_computed_although_it_is_cached_and_serves_others_then() -> None:
    prompt = list(range(40))
    engine, executor, blocks = make_engine(num_blocks=200, max_num_batched_tokens=64)
    listener = Listener(engine, blocks)
    plain, wanting = SamplingParams(max_tokens=1), SamplingParams(max_tokens=1, prompt_logprobs=1)
    computed, requests = [], []
    for number, params in enumerate((plain, plain, wanting, plain)):
        requests.append(Request(str(number), prompt, params))
        before = len(executor.num_tokens)
        engine.add_request(requests[-1])
        listener.to_the_end()
        computed.append(sum(executor.num_tokens[before:]))
    check(listener, requests)
    assert computed == [40, 4, 40, 4]
    stats = engine.stats()
    assert (stats.prefix_cache_queries_total, stats.prefix_cache_hits_total) == (120, 72), (
        "who asks not for it is not counted"
    )


def test_a_pinned_prefix_is_not_shared() -> None:
    engine, _, blocks = make_engine(num_blocks=40, max_num_batched_tokens=64)
    engine.pin_prefix(list(range(33)))
    listener = Listener(engine, blocks)
    request = Request("a", list(range(40)), SamplingParams(max_tokens=2, prompt_logprobs=1))
    engine.add_request(request)
    while engine.has_work():
        listener.step()
    check(listener, [request])
    small, _, _ = make_engine(num_blocks=18, max_num_batched_tokens=64)
    small.pin_prefix(list(range(33)))
    fits = SamplingParams(max_tokens=2)
    small.add_request(Request("shares", list(range(40)), fits))
    with pytest.raises(RequestError, match="needs 11 KV-cache blocks of 4 tokens"):
        small.add_request(request)


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    engine, _, blocks = make_engine()
    listener = Listener(engine, blocks)
    engine.add_request(Request("a", [5], SamplingParams(max_tokens=3, prompt_logprobs=2)))
    listener.to_the_end()
    assert listener.told["a"].positions() == []


def test_more_than_the_engine_allows_is_refused() -> None:
    engine, _, _ = make_engine()
    with pytest.raises(RequestError, match=r"^prompt_logprobs must be in \[0, 20\] \(max_logprobs\), got 21$"):
        engine.add_request(Request("a", [5], SamplingParams(prompt_logprobs=21)))


def test_more_than_can_be_told_of_a_prompt_is_refused() -> None:
    """2^19 log probabilities altogether: 20 beside each token of a prompt of 24,966, and 19 of one of 24,967."""
    engine, _, _ = make_engine(num_blocks=200_000)
    engine.limits = dataclasses.replace(engine.limits, max_model_len=700_000)
    for num_tokens, most in ((24_966, 20), (24_967, 19), (2**18, 1), (2**19, 0)):
        engine.check(Request("a", [5] * num_tokens, SamplingParams(prompt_logprobs=most)))
    message = r"^prompt_logprobs must be in \[0, 19\] with a prompt of 24967 tokens \(at most 524288 log .*, got 20$"
    with pytest.raises(RequestError, match=message):
        engine.add_request(Request("a", [5] * 24_967, SamplingParams(prompt_logprobs=20)))
    with pytest.raises(
        RequestError, match=r"^prompt_logprobs must be left out with a prompt of 524289 tokens .*, got 0$"
    ):
        engine.add_request(Request("a", [5] * (2**19 + 1), SamplingParams(prompt_logprobs=0)))
    assert not engine.has_work()


@pytest.mark.parametrize("best_of", [1, 2])
def test_a_request_that_is_ended_from_outside_tells_what_is_known(best_of: int) -> None:
    """With its first output, even where that is its last one; nothing, where its prompt is not computed."""
    params = SamplingParams(n=1, best_of=best_of, temperature=1, max_tokens=50, prompt_logprobs=1)
    request = Request("a", list(range(20)), params)
    engine, _, blocks = make_engine(max_num_batched_tokens=10, one_step_ahead=False)
    listener = Listener(engine, blocks)
    engine.add_request(request)
    for _ in range(4):
        listener.step()
    for index in range(best_of):
        for output in engine.end_sequence("a", index):
            listener.hear(output)
    check(listener, [request])
    engine.add_request(request)
    engine.step()
    assert [output.prompt_logprobs for output in engine.end_sequence("a", 0)] == ([None] if best_of == 1 else [])
