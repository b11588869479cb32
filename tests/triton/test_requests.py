"""Parsing of requests: what is accepted, and the one clear error for everything else."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagedcore_triton.protocol import OUTPUTS
from pagedcore_triton.requests import (
    MAX_PARAMETERS_BYTES,
    MAX_PROMPT_BYTES,
    MAX_PROMPT_IDS,
    ChatPrompt,
    GenerateRequest,
    check_response_size,
    parse_request,
)

from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.errors import RequestError
from pagedcore.json_text import parse_json_list, parse_json_object


def text(value: str | bytes) -> Any:
    return np.array([value.encode() if isinstance(value, str) else value], dtype=np.object_)


def flag(value: bool) -> Any:
    return np.array([value])


ALL_OUTPUTS = [row.name for row in OUTPUTS]


def parse(parameters: str = "", **inputs: Any) -> GenerateRequest:
    return parse_request(inputs, parameters, ALL_OUTPUTS, model_name="llm")


def test_defaults_are_vllms() -> None:
    request = parse(text_input=text("Hi"))
    assert (request.prompt, request.stream, request.echo) == ("Hi", False, True)
    assert (request.sampling_params.max_tokens, request.sampling_params.temperature) == (16, 1.0)
    assert not parse(text_input=text("Hi"), stream=flag(True)).echo
    assert not parse(text_input=text("Hi"), exclude_input_in_output=flag(True)).echo


def test_numbers_may_be_given_as_text() -> None:
    content = '{"temperature": "0", "top_p": "1", "max_tokens": "100", "ignore_eos": "true"}'
    params = parse(text_input=text("Hi"), sampling_parameters=text(content)).sampling_params
    assert (params.temperature, params.top_p, params.max_tokens, params.ignore_eos) == (0.0, 1.0, 100, True)


def test_the_tensor_wins_over_the_requests_parameters() -> None:
    inputs = {"text_input": text("Hi"), "sampling_parameters": text('{"max_tokens": 3}')}
    assert parse('{"max_tokens": 5}', **inputs).sampling_params.max_tokens == 3
    del inputs["sampling_parameters"]
    assert parse('{"max_tokens": 5}', **inputs).sampling_params.max_tokens == 5


def test_parameters_parsed_before_mean_what_they_meant_then() -> None:
    parameters = '{"max_tokens": 5, "timeout": 1000, "cache_salt": "a"}'
    for _ in range(2):
        request = parse(parameters, text_input=text("x"))
        assert request.sampling_params == SamplingParams(max_tokens=5) and request.cache_salt == "a"
        with pytest.raises(RequestError, match="unknown sampling parameter 'timeout'"):  # a field of requests only
            parse(text_input=text("x"), sampling_parameters=text(parameters))
        logprobs = parse('{"max_tokens": 5}', text_input=text("x"), return_cumulative_logprob=flag(True))
        assert logprobs.sampling_params.logprobs == 0
        assert parse('{"max_tokens": 5}', text_input=text("x")).sampling_params.logprobs is None


def outputs_of(requested: list[str], flags: dict[str, bool]) -> list[str]:
    inputs = {"text_input": text("Hi")} | {f"return_{name}": flag(value) for name, value in flags.items()}
    request = parse_request(inputs, "", requested, model_name="llm")
    return [output.name for output in request.outputs]


def test_only_what_was_asked_for_is_sent() -> None:
    assert outputs_of(ALL_OUTPUTS, {}) == ["text_output"]
    assert outputs_of(ALL_OUTPUTS, {"logprobs": True, "num_input_tokens": False}) == ["text_output", "logprobs"]
    assert outputs_of(ALL_OUTPUTS, dict.fromkeys(ALL_OUTPUTS, True)) == ALL_OUTPUTS
    assert outputs_of(["finish_reason", "logprobs"], {"finish_reason": True}) == ["finish_reason"]


def test_the_engine_computes_log_probabilities_where_an_output_needs_them() -> None:
    asking = {"text_input": text("Hi"), "sampling_parameters": text('{"logprobs": 3}')}
    plain = {"text_input": text("Hi")}
    yes = flag(True)
    found = {
        "neither": parse(**plain),
        "asked, not returned": parse(**asking),
        "asked, returned": parse(**asking, return_logprobs=yes),
        "returned, not asked": parse(**plain, return_logprobs=yes),
        "sum, not asked": parse(**plain, return_cumulative_logprob=yes, return_logprobs=yes),
    }
    assert {name: (request.sampling_params.logprobs, request.wants_logprobs) for name, request in found.items()} == {
        "neither": (None, False),
        "asked, not returned": (3, False),
        "asked, returned": (3, True),
        "returned, not asked": (None, False),
        "sum, not asked": (0, False),
    }


def test_the_prompt_is_text_or_a_conversation_or_token_ids() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    chat = parse(messages=text(json.dumps(messages)))
    assert chat.prompt == ChatPrompt(messages)
    ids = parse(input_ids=np.array([5, 6, 7], np.int32))
    assert ids.prompt == [5, 6, 7]
    assert not chat.echo and not ids.echo
    assert parse(input_ids=np.array([5], np.int32), exclude_input_in_output=flag(False)).echo


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "text_input is required"),
        ({"stream": flag(True)}, "text_input is required"),
        ({"text_input": text("")}, "text_input must be at least 1 character"),
        ({"text_input": text(b"ab\xff")}, "text_input must be valid UTF-8, got byte 0xff at 2"),
        ({"text_input": text(b"\xed\xa0\x80")}, "text_input must be valid UTF-8"),
        ({"text_input": text("x" * (MAX_PROMPT_BYTES + 1))}, f"text_input must have at most {MAX_PROMPT_BYTES} bytes"),
        ({"text_input": np.array([b"a", b"b"], dtype=np.object_)}, r"text_input must have the shape \[1\], got \[2\]"),
        ({"text_input": np.array([1])}, "text_input must be a text"),
        (
            {"text_input": text("Hi"), "stream": flag(True), "exclude_input_in_output": flag(False)},
            "When streaming, `exclude_input_in_output` = False is not allowed",
        ),
        (
            {"text_input": text("Hi"), "input_ids": np.array([1], np.int32)},
            "one of text_input, messages, input_ids must be sent, got text_input and input_ids",
        ),
        ({"input_ids": np.array([], np.int32)}, r"input_ids must have the shape \[n\], n at least 1, got \[0\]"),
        ({"messages": text("")}, "messages must be a JSON list"),
        ({"messages": text('{"role": "user"}')}, "messages must be a JSON list, got dict"),
        ({"text_input": text("Hi"), "image": text("x")}, "image must be left out"),
        ({"embedding_request": text("{}")}, "Model llm does not support 'embed' request"),
    ],
)
def test_bad_inputs(inputs: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        parse(**inputs)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "sampling_parameters must be a JSON object: .* at character 1"),
        ("[]", "sampling_parameters must be a JSON object, got list"),
        ("null", "sampling_parameters must be a JSON object, got NoneType"),
        ("{} x", "sampling_parameters must be a JSON object: Extra data at character 3"),
        ('{"top_k": 1, "top_k": 2}', "sampling_parameters must not repeat a key, got 'top_k' 2 times"),
        ('{"temperature": NaN}', "sampling_parameters must hold finite numbers only, got NaN"),
        ('{"temperature": -Infinity}', "sampling_parameters must hold finite numbers only, got -Infinity"),
        ('{"temperature": 1e999}', "sampling_parameters must hold finite numbers only, got 1e999"),
        ('{"stop": "\\ud800"}', "sampling_parameters must hold valid Unicode text"),
        ("[" * 100_000, "sampling_parameters must be nested at most 32 levels deep, got 100000"),
        ('{"stop": ' + "[" * 32 + "]" * 32 + "}", "sampling_parameters must be nested at most 32 levels deep, got 33"),
        ('{"stop": "' + "[" * 100 + '\\"[", "n": 0}', "n must be an integer in"),
        ('{"stop": "' + '\\"[' * 50_000, "Unterminated string"),
        (
            '{"seed": ' + "9" * 5000 + "}",
            "sampling_parameters must hold integers of at most 64 digits, got one of 5000",
        ),
        (b'{"stop": "\xff"}', "sampling_parameters must be valid UTF-8"),
        (" " * (MAX_PARAMETERS_BYTES + 1), f"sampling_parameters must have at most {MAX_PARAMETERS_BYTES} bytes"),
        ('{"temprature": 1}', "unknown sampling parameter 'temprature', did you mean 'temperature'"),
        ('{"lora_name": "doll"}', r"^LoRA feature is not enabled\.$"),
        ('{"cache_salt": ""}', "cache_salt must be a text of 1 to 128 characters, got a text of 0"),
        ('{"cache_salt": 3}', "cache_salt must be a text of 1 to 128 characters, got 3"),
        ('{"logit_bias": {"7": 1, "07": 2}}', "logit_bias must name every token id once, got 7 twice"),
    ],
)
def test_bad_sampling_parameters(content: str | bytes, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        parse(text_input=text("Hi"), sampling_parameters=text(content))


def test_a_key_repeated_among_many_is_found_in_linear_time() -> None:
    """Comparing every key with every other one would take most of an hour."""
    pairs = ", ".join(f'"{number}": 0' for number in range(200_000))
    with pytest.raises(RequestError, match="must not repeat a key, got '199999' 2 times"):
        parse_json_object("it", f'{{{pairs}, "199999": 1}}')


def test_names_and_lists_of_a_request_have_limits() -> None:
    with pytest.raises(RequestError, match="id must have at most 256 characters, got 257"):
        parse_request({"text_input": text("Hi")}, "", ALL_OUTPUTS, model_name="llm", request_id="x" * 257)
    with pytest.raises(
        RequestError, match=f"input_ids must hold at most {MAX_PROMPT_IDS} ids, got {MAX_PROMPT_IDS + 1}"
    ):
        parse(input_ids=np.zeros(MAX_PROMPT_IDS + 1, np.int32))
    with pytest.raises(RequestError, match=f"the request's parameters must have at most {MAX_PARAMETERS_BYTES}"):
        parse(f'{{"stop": "{"x" * MAX_PARAMETERS_BYTES}"}}', text_input=text("Hi"))
    with pytest.raises(RequestError, match=f"the request's parameters must have at most {MAX_PARAMETERS_BYTES}"):
        parse(f'{{"x": "{"x" * MAX_PARAMETERS_BYTES}"}}', text_input=text("Hi"), sampling_parameters=text("{}"))


def test_the_cache_salt_is_not_a_sampling_parameter() -> None:
    salted = parse('{"cache_salt": "mine", "max_tokens": 3}', text_input=text("Hi"))
    assert (salted.cache_salt, salted.sampling_params) == ("mine", SamplingParams(max_tokens=3))
    assert parse('{"cache_salt": null}', text_input=text("Hi")).cache_salt == ""


_leaves = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5) | st.none()


@given(st.dictionaries(st.text(max_size=5), _leaves | st.lists(_leaves, max_size=3), max_size=5))
def test_json_objects_are_decoded_as_they_were_encoded(values: dict[str, Any]) -> None:
    assert parse_json_object("it", json.dumps(values)) == values
    assert parse_json_list("it", json.dumps([values])) == [values]


@given(st.text(max_size=40) | st.text('{}[]":,0123.-enulNa \\', max_size=40))
def test_any_text_is_an_object_or_a_request_error(content: str) -> None:
    try:
        values = parse_json_object("it", content)
    except RequestError as error:
        assert str(error).startswith("it must ")
    else:
        assert isinstance(values, dict)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "stream", "fits"), [(1000, False, True), (999, False, False), (1, True, True)]
)
def test_log_probabilities_in_one_response_are_bounded(num_prompt_tokens: int, stream: bool, fits: bool) -> None:
    """64 sequences of 780 tokens, 21 at each."""
    sampling = text('{"n": 64, "logprobs": 20, "max_tokens": null}')
    flags = {"return_logprobs": flag(True), "stream": flag(stream)}
    request = parse(text_input=text("Hi"), sampling_parameters=sampling, **flags)
    refusal = r"logprobs must have at most 1048576 entries .* 64 x 781 tokens x 21 = 1049664"
    with nullcontext() if fits else pytest.raises(RequestError, match=refusal):
        check_response_size(request, num_prompt_tokens, 1780)
