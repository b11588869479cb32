"""The paper's memory policies: what each reserves, that it never needs more, and that tokens do not depend on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pagedcore import LLM, SamplingParams, TokensPrompt
from pagedcore.config import KV_POLICIES, EngineConfig
from pagedcore.engine.engine import Engine, EngineLimits
from pagedcore.engine.memory_policy import MemoryPolicy
from pagedcore.engine.request import Request
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.sequence import Sequence
from pagedcore.errors import ConfigError, RequestError
from tests.models import tiny
from tests.reference.fake_model import FakeExecutor, reference_tokens

VOCAB, MAX_MODEL_LEN, BLOCK_SIZE, EOS = 97, 96, 4, 5
BASELINES = KV_POLICIES[1:]


def make_engine(policy_name: str, num_blocks: int, max_num_seqs: int = 12) -> Engine:
    executor = FakeExecutor(num_blocks, BLOCK_SIZE, VOCAB, max_rows=max_num_seqs, max_tokens=48, max_width=25)
    policy = MemoryPolicy(policy_name, MAX_MODEL_LEN)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs, 48), policy.make_blocks(num_blocks, BLOCK_SIZE), executor.step_buffers(), policy
    )
    return Engine(scheduler, executor, EngineLimits(MAX_MODEL_LEN, VOCAB, 20, frozenset({EOS})))


def make_requests(count: int) -> list[Request]:
    """Bounded by max_model_len only; the true output lengths, 2 to 60, come from where the model draws the end token."""
    requests = []
    for number in range(1000):
        prompt = [(number * 31 + 7 * i + i * i) % VOCAB for i in range(1 + (number * 13) % 30)]
        output = reference_tokens(prompt, MAX_MODEL_LEN - len(prompt), VOCAB, frozenset({EOS}))
        if 2 <= len(output) <= 60:
            params = SamplingParams(temperature=0, max_tokens=None)
            requests.append(Request(f"r{number}", prompt, params, expected_output_len=len(output)))
        if len(requests) == count:
            return requests
    raise AssertionError("too few prompts end in time")


def expected(request: Request) -> list[int]:
    prompt = request.prompt_token_ids
    return reference_tokens(prompt, MAX_MODEL_LEN - len(prompt), VOCAB, frozenset({EOS}))


def run(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """Step to the end, and at every step account for every block: what the policy says a sequence holds is what it has."""
    scheduler = engine.scheduler
    blocks, policy = scheduler.blocks, scheduler.policy
    for request in requests:
        engine.add_request(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    tables: dict[int, list[int]] = {}
    while engine.has_work():
        outputs = engine.step()
        for output in outputs:
            assert output.error is None
            tokens[output.request_id] += output.token_ids
        blocks.check_integrity()
        held = 0
        for seq in [seq for group in scheduler.running for seq in group.sequences]:
            table = blocks.block_table(seq.seq_id)
            held += len(table)
            if not policy.is_paged:
                assert table == list(range(table[0], table[0] + len(table))), "consecutive"
                assert tables.setdefault(seq.seq_id, table) == table, "reserved once"
                needed = blocks.blocks_needed(policy.tokens_to_hold(seq))
                assert needed <= len(table) < 2 * needed, "a power of two, and not the next one"
        assert held == blocks.num_blocks - blocks.num_free_blocks
    assert blocks.num_free_blocks == blocks.num_blocks
    return tokens


@pytest.mark.parametrize("policy_name", KV_POLICIES)
def test_tokens_do_not_depend_on_the_policy(policy_name: str) -> None:
    requests = make_requests(24)
    engine = make_engine(policy_name, num_blocks=70)
    assert run(engine, requests) == {request.request_id: expected(request) for request in requests}
    assert (engine.stats().preemptions_total > 0) == (policy_name == "paged"), "a reservation never needs more"


@pytest.mark.parametrize("policy_name", BASELINES)
def test_without_a_known_length_the_request_s_bound_is_reserved(policy_name: str) -> None:
    requests = [replace(request, expected_output_len=None) for request in make_requests(8)]
    engine = make_engine(policy_name, num_blocks=70)
    assert run(engine, requests) == {request.request_id: expected(request) for request in requests}
    assert engine.stats().preemptions_total == 0


def test_an_output_longer_than_expected_is_finished_all_the_same() -> None:
    requests = [replace(request, expected_output_len=1) for request in make_requests(8)]
    engine = make_engine("orca_oracle", num_blocks=70)
    for request in requests:
        engine.add_request(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while engine.has_work():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        engine.scheduler.blocks.check_integrity()
    assert tokens == {request.request_id: expected(request) for request in requests}
    assert engine.stats().preemptions_total > 0


def test_a_static_batch_runs_to_its_end_before_the_next_one() -> None:
    engine = make_engine("static_batch", num_blocks=70, max_num_seqs=2)
    for request in make_requests(5):
        engine.add_request(request)
    batches: list[set[str]] = []
    while engine.has_work():
        engine.step()
        running = {group.request_id for group in engine.scheduler.running}
        if running and not (batches and running <= batches[-1]):
            assert not batches or not running & batches[-1], "joined a running batch"
            batches.append(running)
    assert [len(batch) for batch in batches] == [2, 2, 1]


@pytest.mark.parametrize(
    ("policy_name", "output_len", "tokens"),
    [
        ("paged", 25, 10),
        ("orca_oracle", 25, 35),
        ("orca_pow2", 25, 42),  # the paper's example: 25 is taken for 32
        ("orca_pow2", 32, 42),
        ("orca_pow2", 1, 11),
        ("orca_pow2", 60, 70),  # 64, but the request may not have more than 60
        ("orca_max", 25, 2048),
        ("static_batch", 25, 2048),
        ("orca_oracle", None, 70),
    ],
)
def test_what_a_policy_reserves(policy_name: str, output_len: int | None, tokens: int) -> None:
    request = Request("x", [1] * 10, SamplingParams(max_tokens=60), expected_output_len=output_len)
    sequence = Sequence(0, request, 70, frozenset(), 0)
    assert MemoryPolicy(policy_name, 2048).tokens_to_hold(sequence) == tokens


def test_a_request_that_no_contiguous_range_can_hold_is_refused_with_numbers() -> None:
    engine = make_engine("orca_oracle", num_blocks=15)  # ranges of 8, 4, 2 and 1 blocks
    with pytest.raises(
        RequestError, match=r"needs 9 KV-cache blocks of 4 tokens, but the longest contiguous range .* 8"
    ):
        engine.add_request(Request("x", [1] * 20, SamplingParams(temperature=0, max_tokens=13)))
    fits = Request("fits", [1] * 20, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert len(run(engine, [fits])["fits"]) == 12


@pytest.mark.parametrize("policy_name", BASELINES)
def test_samples_that_would_have_to_share_blocks_are_refused(policy_name: str) -> None:
    engine = make_engine(policy_name, num_blocks=70)
    with pytest.raises(RequestError, match=f"must be 1 with kv_policy '{policy_name}', which shares no blocks, got 2"):
        engine.add_request(Request("x", [1] * 20, SamplingParams(n=2, max_tokens=13)))
    assert not engine.has_work()


def test_bad_configurations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_policy must be one of paged, orca_oracle, .*, got 'orca'"):
        EngineConfig(model="x", kv_policy="orca")
    tiny.make("llama", tmp_path)
    with pytest.raises(ConfigError, match=r"kv_policy 'orca_max' reserves max_model_len = 128 .* has 4 blocks of 16"):
        LLM(
            model=str(tmp_path),
            skip_tokenizer_init=True,
            max_model_len=128,
            kv_policy="orca_max",
            num_gpu_blocks_override=7,
        )


def test_a_real_model_gives_the_same_tokens_under_every_policy(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    prompts = [
        TokensPrompt(prompt_token_ids=[(31 * number + 17 * i + i * i) % tiny.VOCAB_SIZE for i in range(3 + 5 * number)])
        for number in range(10)
    ]
    params = [
        SamplingParams(max_tokens=8 + 4 * number, temperature=0.8 * (number % 2), seed=number, ignore_eos=True)
        for number in range(10)
    ]
    tokens = {}
    for policy_name in KV_POLICIES:
        llm = LLM(
            model=str(tmp_path),
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            block_size=4,
            num_gpu_blocks_override=90,
            kv_policy=policy_name,
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens[policy_name] = [output.outputs[0].token_ids for output in outputs]
        stats = llm.stats()
        llm.shutdown()
        assert stats.num_free_blocks == stats.num_blocks
    assert len({tuple(output) for output in tokens["paged"]}) == len(prompts)
    for policy_name in BASELINES:
        assert tokens[policy_name] == tokens["paged"], policy_name
