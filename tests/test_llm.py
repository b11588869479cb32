"""The offline interface, with the real default model and vLLM's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from pagedcore import LLM, SamplingParams, TokensPrompt
from pagedcore.errors import ConfigError, RequestError
from pagedcore.llm import RequestOutput
from pagedcore.serve.default_model import ensure_default_model

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    engine = LLM(model=str(ensure_default_model()), dtype="float32", max_model_len=256, max_num_seqs=8)
    yield engine
    engine.shutdown()


def test_generate_returns_one_result_per_prompt_in_order(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [PROMPT, "2 + 2 =", PROMPT]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (6, 3, 9)]
    results = llm.generate(prompts, params)
    assert [result.prompt for result in results] == prompts
    assert [len(result.outputs[0].token_ids) for result in results] == [6, 3, 9]
    assert results[2].outputs[0].token_ids[:6] == results[0].outputs[0].token_ids
    tokenizer = llm.get_tokenizer()
    for result in results:
        assert result.finished and result.outputs[0].finish_reason == "length"
        assert result.prompt_token_ids == tokenizer.encode(result.prompt or "")
        assert result.outputs[0].text == tokenizer.decode(result.outputs[0].token_ids)
    assert "Processed prompts" in capsys.readouterr().err


def test_prompts_may_be_token_ids(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPT)
    params = SamplingParams(temperature=0, max_tokens=5)
    as_text, as_ids = (llm.generate(p, params, use_tqdm=False)[0] for p in (PROMPT, TokensPrompt(prompt_token_ids=ids)))
    assert as_ids.prompt is None and as_ids.prompt_token_ids == ids
    assert as_ids.outputs[0].token_ids == as_text.outputs[0].token_ids


def test_stop_strings_end_the_text_and_the_sequence(llm: LLM) -> None:
    free = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)[0].outputs[0]
    stop = free.text[7:12]
    for include in (False, True):
        params = SamplingParams(temperature=0, max_tokens=40, stop=[stop], include_stop_str_in_output=include)
        output = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
        at = free.text.index(stop)
        assert output.text == free.text[: at + len(stop) if include else at]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert len(output.token_ids) < len(free.token_ids)


def test_stop_token_is_reported_and_not_text(llm: LLM) -> None:
    free = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)[0].outputs[0]
    token = free.token_ids[5]
    output = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[token]), use_tqdm=False)
    first = free.token_ids.index(token)
    assert output[0].outputs[0].token_ids == free.token_ids[: first + 1]
    assert (output[0].outputs[0].finish_reason, output[0].outputs[0].stop_reason) == ("stop", token)
    assert output[0].outputs[0].text == llm.get_tokenizer().decode(free.token_ids[:first])


def test_log_probabilities(llm: LLM) -> None:
    output = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4, logprobs=3), use_tqdm=False)[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == 4
    total = 0.0
    for token, position in zip(output.token_ids, output.logprobs, strict=True):
        assert len(position) == 3 and position[token].rank == 1
        ordered = sorted(position.values(), key=lambda entry: entry.rank or 0)
        assert [entry.logprob for entry in ordered] == sorted((e.logprob for e in ordered), reverse=True)
        assert position[token].decoded_token == llm.get_tokenizer().decode([token])
        total += position[token].logprob
    assert output.cumulative_logprob == pytest.approx(total)
    plain = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)[0].outputs[0]
    assert plain.logprobs is None and plain.cumulative_logprob is None


def test_log_probabilities_of_neighbours_that_want_different_numbers(llm: LLM) -> None:
    prompts = [PROMPT, "2 + 2 =", "Once upon a time", "I"]
    params = [SamplingParams(seed=3, max_tokens=5, logprobs=number) for number in (0, 5, None, 2)]
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, param, result in zip(prompts, params, together, strict=True):
        alone = llm.generate(prompt, param, use_tqdm=False)[0].outputs[0]
        output = result.outputs[0]
        assert output.token_ids == alone.token_ids
        if alone.logprobs is None or output.logprobs is None:
            assert alone.logprobs is None and output.logprobs is None and param.logprobs is None
            continue
        for position, expected in zip(output.logprobs, alone.logprobs, strict=True):
            assert {token: entry.rank for token, entry in position.items()} == {
                token: entry.rank for token, entry in expected.items()
            }
            assert [e.logprob for e in position.values()] == pytest.approx(
                [e.logprob for e in expected.values()], abs=1e-4
            )
            assert param.logprobs in (len(position), len(position) - 1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, 2, 3], "a prompt must be a text, .* got 1"),
        (["a", {"foo": 1}], r"a prompt must be a text, .* got \{'foo': 1\}"),
        ({"prompt": "a", "multi_modal_data": {}}, "a prompt must be a text"),
        ({"prompt_token_ids": [1.5]}, r'"prompt_token_ids": a list of integers.* got .*1\.5'),
        ({"prompt_token_ids": "12"}, "a list of integers"),
        ({"prompt_token_ids": 7}, "a list of integers"),
        ("a\ud800b", "got a lone surrogate"),
        (7, "prompts must be one or a list of them, got int"),
    ],
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, use_tqdm=False)


def test_parameters_of_another_type_are_refused(llm: LLM) -> None:
    for wrong in ({"max_tokens": 3}, [{"max_tokens": 3}], 5):
        with pytest.raises(RequestError, match="sampling_params must be SamplingParams or a list of them"):
            llm.generate(PROMPT, wrong, use_tqdm=False)  # type: ignore[arg-type]


def test_several_samples_of_a_prompt(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=7, max_tokens=12, logprobs=0)
    output, single = llm.generate([PROMPT, PROMPT], [params, SamplingParams(seed=7, max_tokens=12)], use_tqdm=False)
    assert output.finished and [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({completion.text for completion in output.outputs}) == 4
    assert output.outputs[0].token_ids == single.outputs[0].token_ids, "the first sample is that of the seed by itself"
    by_rank = sorted(output.outputs, key=lambda completion: -(completion.cumulative_logprob or 0))
    best = llm.generate(PROMPT, SamplingParams(n=2, best_of=4, seed=7, max_tokens=12), use_tqdm=False)[0]
    assert [completion.token_ids for completion in best.outputs] == [completion.token_ids for completion in by_rank[:2]]
    assert best.outputs[0].cumulative_logprob == pytest.approx(by_rank[0].cumulative_logprob)
    stop = output.outputs[2].text[5:9]
    stopped = llm.generate(PROMPT, SamplingParams(n=4, seed=7, max_tokens=12, stop=stop), use_tqdm=False)[0]
    for completion, free in zip(stopped.outputs, output.outputs, strict=True):
        assert completion.text == free.text.split(stop)[0]
    assert stopped.outputs[2].stop_reason == stop


def test_bad_words_are_left_out_and_prompts_truncated(llm: LLM) -> None:
    def generate(**params: Any) -> RequestOutput:
        return llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4, **params), use_tqdm=False)[0]

    plain = generate().outputs[0].text
    word = plain.split()[0]
    assert word not in generate(bad_words=[word]).outputs[0].text
    assert generate(truncate_prompt_tokens=2).prompt_token_ids == llm.get_tokenizer().encode(PROMPT)[-2:]


def test_shared_prefixes_are_computed_once(llm: LLM) -> None:
    prompt = "A long story about a fox and a hare. " * 8
    params = SamplingParams(temperature=0, max_tokens=8)
    text = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text
    for stop in (None, text[4:8]):
        again = llm.generate(prompt, dataclasses.replace(params, stop=stop or ()), use_tqdm=False)[0]
        assert again.outputs[0].stop_reason == stop
        assert again.num_cached_tokens >= 64


def test_pinned_prefixes_and_swap_space_of_a_configuration() -> None:
    def load(**arguments: object) -> LLM:
        shape: dict[str, object] = {"max_model_len": 128, "num_gpu_blocks_override": 16, "max_num_seqs": 8}
        return LLM(model=str(ensure_default_model()), **(shape | arguments))

    system = "You are a helpful assistant who answers in one word."
    llm = load(pinned_prefixes=[system])
    num_tokens = len(llm.get_tokenizer().encode(system))
    assert num_tokens % 16 != 0 and llm.stats().num_pinned_blocks == num_tokens // 16 + 1
    output = llm.generate(system + " What is red?", SamplingParams(max_tokens=2), use_tqdm=False)[0]
    assert output.num_cached_tokens == num_tokens
    llm.shutdown()
    for arguments, message in (
        (
            {"pinned_prefixes": ["fine", [5] * 127], "num_gpu_blocks_override": 8},
            r"pinned_prefixes\[1\]: .* the pool has 7",
        ),
        ({"pinned_prefixes": ["x "], "skip_tokenizer_init": True}, r"pinned_prefixes\[0\] must be token ids"),
        (
            {"pinned_prefixes": ["x"], "kv_policy": "orca_max"},
            r"pinned_prefixes must be empty with kv_policy 'orca_max'",
        ),
        (
            {"swap_space": 1.0, "kv_policy": "orca_pow2"},
            r"swap_space must be 0 or left out with kv_policy 'orca_pow2', which shares and preempts nothing, got 1.0",
        ),
        (
            {"preemption_mode": "swap", "kv_policy": "static_batch"},
            r"preemption_mode must be auto or recompute with kv_policy 'static_batch'",
        ),
        ({"preemption_mode": "swap"}, r"preemption_mode 'swap' needs a swap_space of at least one block .* got 0 GiB"),
        ({"swap_space": 1e6}, r"swap_space asks for 1,000,000.0 GiB; .* GiB are free"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(**arguments)


def test_bad_prompts_and_parameters_are_refused_before_anything_runs(llm: LLM) -> None:
    good = SamplingParams(max_tokens=1)
    for prompts, params, message in (
        ([PROMPT, ""], good, "prompt is empty"),
        (["x " * 400], good, "must have at most 255"),
        ([TokensPrompt(prompt_token_ids=[10**6])], good, "must be in"),
        ([PROMPT] * 2, [good], "one per prompt"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts, params, use_tqdm=False)
        assert (llm.stats().num_running, llm.stats().num_waiting) == (0, 0)


def test_random_weights_need_only_a_config(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_bytes((ensure_default_model() / "config.json").read_bytes())
    llm = LLM(model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=128, max_num_seqs=4)
    prompt = TokensPrompt(prompt_token_ids=[1, 2, 3])
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, detokenize=False)
    output = llm.generate([prompt, prompt], params, use_tqdm=False)
    assert output[0].outputs[0].token_ids == output[1].outputs[0].token_ids
    assert output[0].outputs[0].text == ""
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        llm.generate(PROMPT, params, use_tqdm=False)
    llm.shutdown()
