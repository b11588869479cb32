"""The scheduler and the block manager against an unbatched reference: the tokens never depend on the schedule."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from pagedcore._core import BlockManager
from pagedcore.engine.engine import Engine, EngineLimits
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_extras import EXTRAS_HEADER_SIZE, ExtrasHeader
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.sequence import FinishReason
from pagedcore.engine.step_plan import Header
from pagedcore.engine.step_sizes import NO_PADDING, StepSizes
from pagedcore.engine.swap_space import PreemptionMode
from pagedcore.engine.token_rules import ALWAYS
from pagedcore.errors import EngineDeadError, NonFiniteLogitsError, RequestError
from tests.reference.fake_model import FakeExecutor, reference_tokens

VOCAB = 97
MAX_MODEL_LEN = 96
EOS = 5


def make_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    enable_prefix_caching: bool = True,
    one_step_ahead: bool = True,
    step_sizes: StepSizes = NO_PADDING,
    num_host_blocks: int = 0,
    preemption_mode: PreemptionMode = PreemptionMode.SWAP,
    swap_cost_tokens: float = 0.0,
) -> tuple[Engine, FakeExecutor, BlockManager]:
    executor = FakeExecutor(
        num_blocks,
        block_size,
        VOCAB,
        max_rows=max_num_seqs,
        max_tokens=max_num_batched_tokens,
        max_width=MAX_MODEL_LEN // block_size + 1,
        num_host_blocks=num_host_blocks,
    )
    blocks = BlockManager(
        num_blocks, block_size, num_host_blocks=num_host_blocks, enable_prefix_caching=enable_prefix_caching
    )
    config = SchedulerConfig(
        max_num_seqs,
        max_num_batched_tokens,
        enable_prefix_caching,
        step_sizes=step_sizes,
        preemption_mode=preemption_mode,
        swap_cost_tokens=swap_cost_tokens,
    )
    limits = EngineLimits(MAX_MODEL_LEN, VOCAB, 20, frozenset({EOS}))
    engine = Engine(Scheduler(config, blocks, executor.step_buffers()), executor, limits, one_step_ahead=one_step_ahead)
    return engine, executor, blocks


def make_requests(seed: int, count: int) -> list[Request]:
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    requests = []
    for number in range(count):
        prompt = shared[: rng.choice((0, 0, 7, 16, 24))] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
        params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 30), ignore_eos=rng.random() < 0.5)
        requests.append(Request(f"r{number}", prompt, params))
    return requests


def run(engine: Engine, blocks: BlockManager, arrivals: list[tuple[int, Request]]) -> dict[str, list[int]]:
    """Step until everything has ended; requests arrive before the step given with them."""
    tokens: dict[str, list[int]] = {request.request_id: [] for _, request in arrivals}
    finals: dict[str, int] = dict.fromkeys(tokens, 0)
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    for step in itertools.count():
        while waiting and waiting[0][0] <= step:
            engine.add_request(waiting.pop(0)[1])
        if not waiting and not engine.has_work():
            break
        for output in engine.step():
            assert output.error is None
            tokens[output.request_id] += output.token_ids
            finals[output.request_id] += output.finish_reason is not None
        blocks.check_integrity()
        assert step < 20_000, "the engine makes no progress"
    assert set(finals.values()) == {1}, "every request ends exactly once"
    assert blocks.num_free_blocks == blocks.num_blocks, "every block is back in the pool"
    return tokens


def expected(requests: list[Request]) -> dict[str, list[int]]:
    return {
        request.request_id: reference_tokens(
            request.prompt_token_ids,
            min(request.sampling_params.max_tokens or 0, MAX_MODEL_LEN - len(request.prompt_token_ids)),
            VOCAB,
            frozenset() if request.sampling_params.ignore_eos else frozenset({EOS}),
        )
        for request in requests
    }


@pytest.mark.parametrize("one_step_ahead", [False, True])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize(
    ("num_blocks", "block_size", "budget", "max_num_seqs"),
    [(256, 4, 512, 32), (64, 4, 32, 8), (24, 4, 16, 8), (25, 4, 7, 5), (96, 1, 32, 8), (6, 16, 24, 4), (13, 8, 64, 16)],
)
def test_tokens_do_not_depend_on_the_schedule(
    num_blocks: int, block_size: int, budget: int, max_num_seqs: int, enable_prefix_caching: bool, one_step_ahead: bool
) -> None:
    for seed in range(6):
        engine, executor, blocks = make_engine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_prefix_caching=enable_prefix_caching,
            one_step_ahead=one_step_ahead,
            step_sizes=StepSizes((1, 3, max_num_seqs + 1), (4, 9, budget), (2, max_num_seqs))
            if seed % 2
            else NO_PADDING,
        )
        requests = make_requests(seed, 24)
        rng = random.Random(seed)
        arrivals = [(rng.choice((0, 0, 3, 20, 60)), request) for request in requests]
        assert run(engine, blocks, arrivals) == expected(requests)
        assert max(executor.num_rows) > 1, "requests were batched"


def test_small_pools_preempt_and_large_ones_do_not() -> None:
    for num_blocks, preempts in ((24, True), (512, False)):
        engine, _, blocks = make_engine(num_blocks=num_blocks, max_num_seqs=16)
        requests = make_requests(1, 16)
        assert run(engine, blocks, [(0, request) for request in requests]) == expected(requests)
        assert (engine.stats().preemptions_total > 0) == preempts


def test_equal_prompts_share_blocks_only_under_the_same_salt() -> None:
    prompt = list(range(10, 42))
    for salts, hits in ((("", ""), 28), (("a", "a"), 28), (("a", "b"), 0)):
        engine, _, blocks = make_engine()
        for number, salt in enumerate(salts):
            request = Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=3), cache_salt=salt)
            run(engine, blocks, [(0, request)])
        assert engine.stats().prefix_cache_hits_total == hits


def test_draws_depend_on_seed_and_position_only() -> None:
    prompt = list(range(20))
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    alone, _, blocks = make_engine()
    solo = run(alone, blocks, [(0, Request("x", prompt, params))])["x"]
    for num_blocks in (24, 128):
        engine, _, blocks = make_engine(num_blocks=num_blocks, max_num_seqs=16)
        others = [(0, request) for request in make_requests(4, 15)]
        assert run(engine, blocks, [*others, (2, Request("x", prompt, params))])["x"] == solo
    other_seed = SamplingParams(temperature=1.0, seed=12, max_tokens=12, ignore_eos=True)
    engine, _, blocks = make_engine()
    assert run(engine, blocks, [(0, Request("x", prompt, other_seed))])["x"] != solo


@pytest.mark.parametrize("one_step_ahead", [False, True])
def test_abort_at_every_step_frees_the_blocks_and_hurts_nobody(one_step_ahead: bool) -> None:
    for at in range(0, 40, 3):
        engine, _, blocks = make_engine(num_blocks=30, one_step_ahead=one_step_ahead)
        requests = make_requests(at, 10)
        for request in requests:
            engine.add_request(request)
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        for step in itertools.count():
            if step == at:
                for victim in ("r2", "r7"):
                    engine.abort(victim)
                    tokens.pop(victim)
                    assert engine.abort(victim) is None
            if not engine.has_work():
                break
            for output in engine.step():
                assert output.request_id in tokens, "nothing is heard of a request after its end"
                tokens[output.request_id] += output.token_ids
        wanted = expected(requests)
        assert tokens == {name: wanted[name] for name in tokens}
        assert blocks.num_free_blocks == blocks.num_blocks


def test_a_failed_step_ends_its_own_requests_and_no_others() -> None:
    engine, executor, blocks = make_engine(max_num_seqs=4)
    requests = make_requests(3, 12)
    executor.fail_steps = {5}
    for request in requests:
        engine.add_request(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    failed = set()
    while engine.has_work():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is FinishReason.ERROR:
                assert "planted failure" in str(output.error)
                failed.add(output.request_id)
    wanted = expected(requests)
    assert 0 < len(failed) <= 4
    assert all(tokens[name] == wanted[name] for name in tokens if name not in failed)
    assert blocks.num_free_blocks == blocks.num_blocks


@pytest.mark.parametrize("num_failures", [2, 3])
@pytest.mark.parametrize("rows_fail", [False, True])
def test_a_step_launched_before_a_failure_was_known_costs_its_newcomers_nothing(
    rows_fail: bool, num_failures: int
) -> None:
    """Two requests run, two more arrive just before the step that is launched behind the one that fails, and fails too."""
    engine, executor, blocks = make_engine(max_num_seqs=5, num_blocks=128, max_num_batched_tokens=64)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    old = [Request("a", [1, 2, 3], params), Request("b", [4] * 9, params)]
    new = [
        Request("c", list(range(40)), params),
        Request("d", [7], params),
    ]  # d is planned before c: it decodes at once
    late = Request("e", [8, 9], params)
    first = 6
    executor.broken_steps, executor.fail_steps = ({first}, set(range(first + 1, first + num_failures)))
    if not rows_fail:
        executor.broken_steps, executor.fail_steps = set(), executor.fail_steps | {first}
    for request in old:
        engine.add_request(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in (*old, *new, late)}
    failed: set[str] = set()
    while engine.has_work():
        step = engine.stats().steps_total
        for request in {first + 1: new, first + 2: [late]}.get(step, []):
            engine.add_request(request)
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            failed |= {output.request_id} if output.error is not None else set()
        if step == first + 1:
            assert engine.stats().num_preempted == 2, "the failed step is taken back"
            assert [group.request_id for group in engine.scheduler.preempted] == ["c", "d"]
        blocks.check_integrity()
    # A third failure is theirs: nobody else was in that step.
    assert failed == ({"a", "b"} if num_failures == 2 else {"a", "b", "c", "d", "e"})
    wanted = expected([*old, *new, late])
    assert all(tokens[name] == wanted[name] for name in tokens if name not in failed)
    assert blocks.num_free_blocks == blocks.num_blocks


@pytest.mark.parametrize("budget", [32, 8])  # the second one: the prompt in chunks, the first of which draw nothing
def test_nothing_of_a_row_that_is_not_finite_is_cached(budget: int) -> None:
    engine, executor, _ = make_engine(max_num_batched_tokens=budget)
    executor.broken_steps = {0}
    prompt = list(range(20))
    first = Request("x", prompt, SamplingParams(temperature=0, max_tokens=4))
    engine.add_request(first)
    errors = []
    while engine.has_work():
        errors += [output.error for output in engine.step()]
    assert len(errors) == 1 and isinstance(errors[0], NonFiniteLogitsError)
    assert engine.stats().num_cached_blocks == 0


def test_steps_that_keep_failing_end_the_engine() -> None:
    engine, executor, _ = make_engine(max_num_seqs=1)
    executor.fail_steps = set(range(100))
    for request in make_requests(3, 8):
        engine.add_request(request)
    with pytest.raises(EngineDeadError, match="3 steps in a row failed"):
        for _ in range(20):
            engine.step()


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1] * MAX_MODEL_LEN, {}, "the prompt has 96 tokens; it must have at most 95"),
        ([1, VOCAB], {}, r"prompt_token_ids must be in \[0, 96\], got 97"),
        ([-1], {}, r"prompt_token_ids must be in \[0, 96\], got -1"),
        ([1], {"stop_token_ids": [VOCAB]}, r"stop_token_ids must be in \[0, 96\], got 97"),
        ([1], {"logprobs": 21}, r"logprobs must be in \[0, 20\]"),
        ([1] * 40, {"max_tokens": 40}, "needs 20 KV-cache blocks of 4 tokens, but the pool has 16"),
    ],
)
def test_requests_that_can_never_run_are_refused_with_numbers(
    prompt: list[int], params: dict[str, object], message: str
) -> None:
    engine, _, _ = make_engine(num_blocks=16)
    with pytest.raises(RequestError, match=message):
        engine.add_request(Request("x", prompt, SamplingParams(**params)))  # type: ignore[arg-type]
    assert not engine.has_work()


def test_bad_words_that_no_draws_make_up_are_left_out() -> None:
    """Those of which a tokenizer leaves nothing, and those with tokens that were added to it and that the model does not know."""
    words = ((), (3,), (VOCAB,), (4, VOCAB + 5))
    params = SamplingParams(temperature=0, max_tokens=4, bad_words=["x"] * 4)
    engine, _, _ = make_engine()
    engine.add_request(Request("x", [1, 2], params, bad_words=words))
    engine.check(Request("y", [1, 2], replace(params, allowed_token_ids=[3, 4]), bad_words=words))
    with pytest.raises(RequestError, match="allowed_token_ids must hold a token that does not end a bad word"):
        engine.check(Request("y", [1, 2], replace(params, allowed_token_ids=[3]), bad_words=words))
    plan = engine.scheduler.schedule()
    assert plan is not None
    at = Header(*plan.buffer[: len(Header._fields)].tolist()).extras_offset
    extras = plan.buffer[at : plan.used].tolist()
    assert ExtrasHeader(*extras[: len(ExtrasHeader._fields)]).num_bans == 1
    assert extras[EXTRAS_HEADER_SIZE:] == [0, 3, ALWAYS]


def test_a_request_that_needs_the_whole_pool_runs() -> None:
    engine, _, blocks = make_engine(num_blocks=24)
    request = Request("x", [1] * 60, SamplingParams(temperature=0, max_tokens=36, ignore_eos=True))
    assert blocks.blocks_needed(60 + 36 - 1) == blocks.num_blocks
    others = make_requests(7, 6)
    arrivals = [(0, other) for other in others] + [(1, request)]
    assert run(engine, blocks, arrivals) == expected([*others, request])


def test_a_step_whose_rows_share_one_token_is_none_of_decodes() -> None:
    """However many rows and tokens it has with its padding: its rows draw from the token that one of them computes."""
    engine, _, _ = make_engine(step_sizes=StepSizes((8,), (8,), (8,)))
    params = SamplingParams(temperature=1.0, seed=1, n=6, max_tokens=4, ignore_eos=True)
    engine.add_request(Request("a", [5], params))
    plan = engine.scheduler.schedule()
    assert plan is not None
    header = Header(*plan.buffer[: len(Header._fields)].tolist())
    assert (header.num_tokens, header.num_rows, header.max_query_len) == (8, 8, 1)
    assert plan.num_scheduled_tokens == [1, 0, 0, 0, 0, 0] and not header.is_decode
    engine, _, _ = make_engine(step_sizes=StepSizes((8,), (8,), (8,)))
    for name in "abc":
        engine.add_request(Request(name, [5], SamplingParams(max_tokens=4)))
    plan = engine.scheduler.schedule()
    assert plan is not None and Header(*plan.buffer[: len(Header._fields)].tolist()).is_decode
