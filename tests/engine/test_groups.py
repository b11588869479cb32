"""Several sequences of one prompt: computed once, drawn apart, and the same whatever else the engine does."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from pagedcore._core import BlockManager
from pagedcore.engine.engine import Engine
from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_extras import pack_sampling_row
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.seeds import mix_seed
from pagedcore.engine.sequence import FinishReason
from pagedcore.engine.sequence_group import blocks_of_group
from pagedcore.engine.swap_space import PreemptionMode
from pagedcore.errors import NonFiniteLogitsError, RequestError
from tests.engine.test_schedule_invariance import EOS, MAX_MODEL_LEN, VOCAB, make_engine
from tests.reference.fake_model import reference_logprob, reference_tokens

Outputs = dict[tuple[str, int], list[int]]


def make_mixed_requests(seed: int, count: int, width: int = 4) -> list[Request]:
    """Greedy and seeded, one sequence and several, all output or the best of them, and beams; some prompts begin alike."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(20)]
    requests = []
    for number in range(count):
        prompt = shared[: rng.choice((0, 0, 7, 16, 20))] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 24))]
        n = rng.choice((1, 1, 2, 3, width))
        common: dict[str, Any] = {"seed": number, "max_tokens": rng.randint(1, 24), "ignore_eos": rng.random() < 0.5}
        kinds: list[dict[str, Any]] = [
            {"n": n, "temperature": 0},
            {"n": n, "temperature": 0.8},
            {"n": n, "best_of": min(n + 1, width), "temperature": 0.8},
            {"n": min(n, 2), "beam_width": rng.randint(2, width), "temperature": 0, "early_stopping": n == 1},
        ]
        requests.append(Request(f"r{number}", prompt, SamplingParams(**common, **rng.choice(kinds))))
    return requests


def expected_outputs(requests: list[Request]) -> Outputs:
    """Every sequence drawn by itself, every beam search run by itself (tests/models/test_beam_search.py says that it is right)."""
    outputs: Outputs = {}
    for request in requests:
        if request.sampling_params.use_beam_search:
            alone = start(num_blocks=300, enable_prefix_caching=False, one_step_ahead=False, max_num_batched_tokens=200)
            alone.add(request)
            outputs |= alone.to_the_end()
            continue
        params, prompt = request.sampling_params, request.prompt_token_ids
        assert params.seed is not None and params.max_tokens is not None
        samples = []
        for index in range(params.num_sequences):
            seed = params.seed if index == 0 else mix_seed(params.seed, index)
            stops = frozenset() if params.ignore_eos else frozenset({EOS})
            limit = min(params.max_tokens, MAX_MODEL_LEN - len(prompt))
            sampling = pack_sampling_row(params, seed).tolist()
            samples.append(reference_tokens(prompt, limit, VOCAB, stops, sampling))
        if params.ranks_outputs:
            samples.sort(key=lambda tokens: -reference_logprob(prompt, tokens, VOCAB))
        outputs |= {(request.request_id, index): tokens for index, tokens in enumerate(samples[: params.n])}
    return outputs


class Run:
    """Steps an engine to the end of its requests and checks what every run must keep to."""

    def __init__(self, engine: Engine, blocks: BlockManager) -> None:
        self.engine, self.blocks = engine, blocks
        self.outputs: Outputs = {}
        self.messages: dict[str, list[TokenOutput]] = {}

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.engine.add_request(request)
            self.messages[request.request_id] = []

    def take(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            earlier = self.messages[output.request_id]
            assert not earlier or not earlier[-1].request_finished, "nothing is heard of a request after its end"
            ended = {message.index for message in earlier if message.finish_reason is not None}
            whole = output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
            assert whole or output.index not in ended, "nothing is heard of a sequence after its end"
            earlier.append(output)
            self.outputs.setdefault((output.request_id, output.index), []).extend(output.token_ids)

    def to_the_end(self, arrivals: dict[int, list[Request]] | None = None) -> Outputs:
        left = dict(arrivals or {})
        for step in itertools.count():
            self.add(*left.pop(step, []))
            if not left and not self.engine.has_work():
                break
            self.take(self.engine.step())
            self.blocks.check_integrity()
            assert step < 20_000, "the engine makes no progress"
        assert all(messages[-1].request_finished for messages in self.messages.values())
        assert self.blocks.num_free_blocks == self.blocks.num_blocks, "every block is back in the pool"
        assert self.blocks.num_free_host_blocks == self.blocks.num_host_blocks
        return self.outputs


def start(**arguments: Any) -> Run:
    engine, _, blocks = make_engine(**arguments)
    return Run(engine, blocks)


# (num_blocks, block_size, max_num_batched_tokens, max_num_seqs); the largest request just fits the tight ones.
ROOMY = [(256, 4, 512, 32), (128, 4, 32, 8)]
TIGHT = [(40, 4, 24, 24), (38, 4, 13, 13), (140, 1, 32, 16), (14, 16, 24, 16), (21, 8, 64, 24)]


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


def test_one_sequence_can_be_ended_and_the_others_go_on() -> None:
    for at in range(1, 50):
        budget = 8 if at % 3 else 32  # with the small one, what is in common is recomputed in several steps
        run = start(
            num_blocks=26,
            max_num_seqs=8,
            max_num_batched_tokens=budget,
            num_host_blocks=100 * (at % 2),
            enable_prefix_caching=False,
        )
        request = Request("x", list(range(21)), SamplingParams(n=4, seed=1, max_tokens=12, ignore_eos=True))
        run.add(
            *[Request(f"other{i}", [i] * 9, SamplingParams(seed=i, n=2, ignore_eos=True)) for i in range(2)],
            request,
        )
        for step in itertools.count():
            if step == at:
                run.take(run.engine.end_sequence("x", 2))
                run.take(run.engine.end_sequence("x", 2))
                assert run.engine.end_sequence("y", 0) == []
            if not run.engine.has_work():
                break
            run.take(run.engine.step())
            run.blocks.check_integrity()
        assert run.blocks.num_free_blocks == run.blocks.num_blocks
        wanted = expected_outputs([request])
        reasons = [message.finish_reason for message in run.messages["x"] if message.index == 2]
        assert reasons[-1] in (FinishReason.STOP, FinishReason.LENGTH)
        for index in range(4):
            tokens = run.outputs["x", index]
            assert tokens == wanted["x", index][: len(tokens)]
            assert index == 2 or tokens == wanted["x", index]


@pytest.mark.parametrize("one_step_ahead", [False, True])
def test_an_abort_at_any_step_ends_the_whole_request_with_one_message(one_step_ahead: bool) -> None:
    for at in range(0, 40, 3):
        run = start(num_blocks=40, one_step_ahead=one_step_ahead, num_host_blocks=100 * (at % 2), max_num_seqs=16)
        requests = make_mixed_requests(at, 10)
        run.add(*requests)
        for step in itertools.count():
            for victim in ("r2", "r7") if step == at else ():
                output = run.engine.abort(victim)
                run.take([] if output is None else [output])
                assert run.engine.abort(victim) is None
            if not run.engine.has_work():
                break
            run.take(run.engine.step())
            run.blocks.check_integrity()
        wanted = expected_outputs([request for request in requests if request.request_id not in ("r2", "r7")])
        assert {key: tokens for key, tokens in run.outputs.items() if key in wanted} == wanted
        assert run.blocks.num_free_blocks == run.blocks.num_blocks


def test_a_failed_step_ends_its_requests_once_and_those_of_the_step_behind_it_are_recomputed() -> None:
    for at in range(2, 40):
        engine, executor, blocks = make_engine(max_num_seqs=16, num_blocks=40, num_host_blocks=100 * (at % 2))
        executor.fail_steps = {at, at + 1}  # the second was launched before the first was known to fail
        run = Run(engine, blocks)
        requests = make_mixed_requests(at, 14)
        run.add(*requests)
        while engine.has_work():
            run.take(engine.step())
            blocks.check_integrity()
        failed = {name for name, messages in run.messages.items() if messages[-1].error is not None}
        assert failed and all(messages[-1].request_finished for messages in run.messages.values())
        wanted = expected_outputs([request for request in requests if request.request_id not in failed])
        assert {key: tokens for key, tokens in run.outputs.items() if key in wanted} == wanted
        assert blocks.num_free_blocks == blocks.num_blocks


def test_logits_that_are_not_finite_end_the_whole_request() -> None:
    engine, executor, blocks = make_engine()
    executor.broken_steps = {2}
    run = Run(engine, blocks)
    run.add(Request("x", list(range(9)), SamplingParams(n=3, max_tokens=8, ignore_eos=True)))
    run.to_the_end()
    assert isinstance(run.messages["x"][-1].error, NonFiniteLogitsError)
    assert len([message for message in run.messages["x"] if message.finish_reason is not None]) == 1


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
