"""Sampling parameters: vLLM's names and defaults, and a clear refusal of everything else."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.errors import RequestError


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == ((), (), False)
    assert params.detokenize and params.skip_special_tokens and params.spaces_between_special_tokens
    assert not params.include_stop_str_in_output
    assert not params.has_penalties and not params.is_greedy


def test_values_are_normalized() -> None:
    ids: list[Any] = [3, np.int64(4)]
    params = SamplingParams(stop="\n", stop_token_ids=ids, top_k=-1, seed=-1, max_tokens=None, temperature=1)
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (3, 4)
    assert (params.top_k, params.seed, params.max_tokens) == (0, None, None)
    assert isinstance(params.temperature, float)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert dataclasses.replace(params, top_k=7).top_k == 7
    assert hash(params) == hash(dataclasses.replace(params))


def test_a_tiny_temperature_is_greedy_and_switches_filters_off() -> None:
    params = SamplingParams(temperature=9e-6, top_k=5, top_p=0.5, min_p=0.1)
    assert params.is_greedy
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.0, 0, 1.0, 0.0)
    assert not SamplingParams(temperature=1e-5, top_k=5).is_greedy


@pytest.mark.parametrize(
    "values", [{"repetition_penalty": 1.1}, {"presence_penalty": -0.5}, {"frequency_penalty": 0.1}]
)
def test_any_penalty_sets_the_flag(values: dict[str, float]) -> None:
    assert SamplingParams(**values).has_penalties  # type: ignore[arg-type]


def test_numbers_and_booleans_may_be_text() -> None:
    params = SamplingParams.from_dict(
        {
            "max_tokens": "100",
            "min_tokens": " 7 ",
            "top_k": "-1",
            "temperature": "0.5",
            "top_p": "1",
            "frequency_penalty": "-1e-1",
            "ignore_eos": "True",
            "skip_special_tokens": "false",
            "seed": "18446744073709551615",
            "stop": "10",
            "n": "2",
        }
    )
    assert (params.max_tokens, params.min_tokens, params.top_k) == (100, 7, 0)
    assert (params.temperature, params.top_p, params.frequency_penalty) == (0.5, 1.0, -0.1)
    assert params.ignore_eos is True and params.skip_special_tokens is False
    assert (params.seed, params.n) == (2**64 - 1, 2)
    assert params.stop == ("10",)


def test_beam_search_by_either_name_is_the_same() -> None:
    own = SamplingParams.from_dict({"beam_width": "4", "n": 2, "temperature": 0, "early_stopping": "True"})
    other = SamplingParams(use_beam_search=True, best_of=4, n=2, temperature=0, early_stopping=True)
    assert own == other and own.use_beam_search and own.beam_width == own.num_sequences == 4
    assert SamplingParams(use_beam_search=True, n=3, temperature=0).beam_width == 3
    assert SamplingParams(beam_width=2, temperature=0, early_stopping="never").ranks_outputs
    best = SamplingParams(n=2, best_of=5)
    assert (best.num_sequences, best.ranks_outputs, SamplingParams(n=5).ranks_outputs) == (5, True, False)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, r"temperature must be a number in \[0, 100\], got -0.1"),
    ({"temperature": math.nan}, r"temperature must be a number in \[0, 100\], got nan"),
    ({"temperature": math.inf}, r"temperature .* got inf"),
    ({"temperature": "warm"}, r"temperature .* got 'warm'"),
    ({"temperature": "nan"}, r"temperature .* got 'nan'"),
    ({"temperature": None}, r"temperature .* got None"),
    ({"temperature": True}, r"temperature .* got True"),
    ({"temperature": [1]}, r"temperature .* got \[1\]"),
    ({"top_p": 0}, r"top_p must be a number in \(0, 1\], got 0"),
    ({"top_p": 1.0001}, r"top_p must be a number in \(0, 1\], got 1.0001"),
    ({"min_p": -1e-9}, r"min_p must be a number in \[0, 1\]"),
    ({"top_k": -2}, r"top_k must be an integer in \[-1, 2147483647\], got -2"),
    ({"top_k": 1.5}, r"top_k must be an integer .* got 1.5"),
    ({"top_k": "1.5"}, r"top_k must be an integer .* got '1.5'"),
    ({"presence_penalty": 2.1}, r"presence_penalty must be a number in \[-2, 2\], got 2.1"),
    ({"frequency_penalty": -2.1}, r"frequency_penalty must be a number in \[-2, 2\], got -2.1"),
    ({"repetition_penalty": 0}, r"repetition_penalty must be a number in \[0.01, 100\], got 0"),
    ({"max_tokens": 0}, r"max_tokens must be an integer in \[1, 2147483647\], got 0"),
    ({"max_tokens": True}, r"max_tokens .* got True"),
    ({"max_tokens": 8.5}, r"max_tokens .* got 8\.5"),
    ({"max_tokens": 0.0}, r"max_tokens .* got 0"),
    ({"max_tokens": 10**400}, r"max_tokens .* got an integer of 1329 bits"),
    ({"max_tokens": "9" * 5000}, r"max_tokens .* got '9{60}\.\.\."),
    ({"min_tokens": -1}, r"min_tokens must be an integer in \[0, 2147483647\], got -1"),
    ({"min_tokens": 17}, r"min_tokens must be at most max_tokens \(16\), got 17"),
    ({"seed": 2**64}, r"seed must be an integer in \[-1, 18446744073709551615\]"),
    ({"logprobs": -1}, r"logprobs must be an integer in \[0, max_logprobs\], got -1"),
    ({"stop": ""}, r"stop must hold texts of 1 to 1024 characters, got ''"),
    ({"stop": [1]}, r"stop must hold texts of 1 to 1024 characters, got 1"),
    ({"stop": 5}, r"stop must be text or a list of texts, got 5"),
    ({"stop": ["x" * 1025]}, r"stop must hold texts of 1 to 1024 characters, got 'x{60}\.\.\."),
    ({"stop": ["x"] * 65}, r"stop must hold at most 64 texts, got 65"),
    ({"stop": "a", "detokenize": False}, r"stop needs detokenize to be true"),
    ({"stop_token_ids": [-1]}, r"stop_token_ids must hold token ids .* got -1"),
    ({"stop_token_ids": [1.0]}, r"stop_token_ids must hold token ids .* got 1.0"),
    ({"stop_token_ids": "12"}, r"stop_token_ids must be a list of token ids, got '12'"),
    ({"stop_token_ids": list(range(129))}, r"stop_token_ids must hold at most 128 ids, got 129"),
    ({"ignore_eos": 1}, r"ignore_eos must be true or false, got 1"),
    ({"ignore_eos": "yes"}, r"ignore_eos must be true or false, got 'yes'"),
    ({"n": 0}, r"n must be an integer in \[1, 64\], got 0"),
    ({"n": 65}, r"n must be an integer in \[1, 64\], got 65"),
    ({"n": True}, r"n must be an integer in \[1, 64\], got True"),
    ({"best_of": 65}, r"best_of must be an integer in \[1, 64\], got 65"),
    ({"n": 3, "best_of": 2}, r"best_of must be at least n \(3\), got 2"),
    ({"best_of": 2, "stop": "a"}, r"stop must be empty when best_of is above n .* got \('a',\)"),
    ({"length_penalty": 0.5}, r"length_penalty needs use_beam_search or beam_width, got 0.5"),
    ({"early_stopping": 0}, r'early_stopping must be true, false or "never", got 0'),
    ({"early_stopping": True}, r"early_stopping needs use_beam_search or beam_width, got True"),
    ({"beam_width": 1, "temperature": 0}, r"beam_width must be an integer in \[2, 64\], got 1"),
    ({"beam_width": 65, "temperature": 0}, r"beam_width must be an integer in \[2, 64\], got 65"),
    ({"use_beam_search": True, "temperature": 0}, r"n must be in \[2, 64\] with beam search, got 1"),
    (
        {"use_beam_search": True, "best_of": 1, "temperature": 0},
        r"best_of must be in \[2, 64\] with beam search, got 1",
    ),
    ({"beam_width": 4}, r"temperature must be 0 with beam search, got 1"),
    ({"beam_width": 4, "best_of": 3, "temperature": 0}, r"best_of must be beam_width \(4\) or left out .* got 3"),
    ({"beam_width": 4, "n": 5, "temperature": 0}, r"n must be in \[1, 4\] \(beam_width\) with beam search, got 5"),
    ({"beam_width": 4, "temperature": 0, "logprobs": 1}, r"logprobs must be null or left out with beam search, got 1"),
    ({"beam_width": 4, "temperature": 0, "stop": "a"}, r"stop must be empty with beam search, got \('a',\)"),
    ({"beam_width": 4, "temperature": 0, "presence_penalty": 1}, r"presence_penalty must be 0 with beam search, got 1"),
    ({"beam_width": 4, "temperature": 0, "early_stopping": "maybe"}, r'true, false or "never", got \'maybe\''),
    ({"beam_width": 4, "temperature": 0, "length_penalty": 6}, r"length_penalty must be a number in \[-5, 5\], got 6"),
    ({"prompt_logprobs": -1}, r"prompt_logprobs must be an integer in \[0, max_logprobs\], got -1"),
    ({"prompt_logprobs": True}, r"prompt_logprobs must be an integer in \[0, max_logprobs\], got True"),
    (
        {"beam_width": 4, "temperature": 0, "prompt_logprobs": 0},
        r"prompt_logprobs must be null or left out with beam search, got 0",
    ),
    ({"priority": 2**31}, r"priority must be an integer in \[-2147483648, 2147483647\], got 2147483648"),
    ({"priority": 0.5}, r"priority must be an integer in .*, got 0.5"),
    ({"tenant": 7}, "tenant must be a text of at most 128 characters, got 7"),
    ({"tenant": "x" * 129}, "tenant must be a text of at most 128 characters, got 'xxx"),
    ({"flat_logprobs": True}, r"flat_logprobs is not supported"),
    ({"output_kind": 1}, r"output_kind is not supported"),
    ({"logits_processors": [print]}, r"logits_processors is not supported"),
    ({"structured_outputs": "{}"}, r"structured_outputs is not supported"),
    ({"guided_decoding": "{}"}, r"guided_decoding is not supported"),
    ({"bad_words": "x"}, r"bad_words must be a list of texts, got 'x'"),
    ({"bad_words": [" "]}, r"bad_words must hold texts of at most 1024 characters, not only spaces, got ' '"),
    ({"bad_words": ["x"] * 129}, r"bad_words must hold at most 128 texts, got 129"),
    ({"logit_bias": [1]}, r"logit_bias must be an object of biases by token id, got \[1\]"),
    ({"logit_bias": {"a": 1}}, r"logit_bias must have token ids \(integers from 0 up\) as keys, got 'a'"),
    ({"logit_bias": {"-1": 1}}, r"logit_bias must have token ids .* got '-1'"),
    ({"logit_bias": {"1": 100.5}}, r"logit_bias must have numbers in \[-100, 100\] as values, got 100.5"),
    ({"logit_bias": {"1": math.nan}}, r"logit_bias must have numbers in .* got nan"),
    ({"logit_bias": {"1": True}}, r"logit_bias must have numbers in .* got True"),
    ({"logit_bias": dict.fromkeys(range(1025), 1)}, r"logit_bias must hold at most 1024 token ids, got 1025"),
    ({"allowed_token_ids": []}, r"allowed_token_ids must hold at least 1 id"),
    ({"allowed_token_ids": [-1]}, r"allowed_token_ids must hold token ids .* got -1"),
    ({"allowed_token_ids": list(range(1025))}, r"allowed_token_ids must hold at most 1024 ids, got 1025"),
    ({"truncate_prompt_tokens": 0}, r"truncate_prompt_tokens must be -1 or at least 1, got 0"),
    ({"truncate_prompt_tokens": -2}, r"truncate_prompt_tokens must be an integer in \[-1, 2147483647\], got -2"),
    ({"temprature": 1}, r"unknown sampling parameter 'temprature', did you mean 'temperature'\?"),
    ({"has_penalties": True}, r"unknown sampling parameter 'has_penalties'"),
    ({"__class__": 1}, r"unknown sampling parameter '__class__'; known ones: n, "),
    ({"caf\u00e9\n": 1}, r"unknown sampling parameter 'caf\\xe9\\n'"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[str(values)[:40] for values, _ in REFUSED])
def test_bad_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams.from_dict(values)
    assert len(str(caught.value)) < 1000


def test_token_rules_are_normalized() -> None:
    params = SamplingParams.from_dict(
        {
            "logit_bias": {"7": 1, "3": -0.5},
            "allowed_token_ids": [5, 4, 5],
            "bad_words": ["a", " b"],
            "truncate_prompt_tokens": "9",
        }
    )
    assert params.logit_bias == ((3, -0.5), (7, 1.0))
    assert params.allowed_token_ids == (5, 4)
    assert params.bad_words == ("a", " b")
    assert params.truncate_prompt_tokens == 9
    assert params.has_token_rules
    assert dataclasses.replace(params, top_k=1).logit_bias == params.logit_bias
    assert SamplingParams.from_dict({"logit_bias": {}, "bad_words": []}) == SamplingParams()
    assert not SamplingParams().has_token_rules


def test_parameters_of_vllm_that_ask_for_nothing_are_accepted() -> None:
    neutral = {"prompt_logprobs": None, "flat_logprobs": False, "structured_outputs": None}
    assert SamplingParams.from_dict(neutral) == SamplingParams()


def test_the_constructor_takes_no_text_for_numbers() -> None:
    with pytest.raises(RequestError, match="max_tokens must be an integer"):
        SamplingParams(max_tokens="100")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="ignore_eos must be true or false"):
        SamplingParams(ignore_eos="true")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bad_words", "logit_bias", "allowed_token_ids", "best_of", "stop", "stop_token_ids"])
def test_none_means_left_out(name: str) -> None:
    assert SamplingParams.from_dict({name: None}) == SamplingParams()


def test_whole_numbers_may_be_written_with_a_fraction() -> None:
    params = SamplingParams.from_dict({"max_tokens": 8.0, "top_k": 40.0, "seed": 1e15})
    assert (params.max_tokens, params.top_k, params.seed) == (8, 40, 10**15)
    assert all(type(value) is int for value in (params.max_tokens, params.top_k, params.seed))
