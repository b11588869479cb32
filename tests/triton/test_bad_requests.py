"""Every bad request gets one INVALID_ARG that names what is wrong, and its neighbours do not notice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import Answer, generate, generate_grpc

HELLO = "Hello"


def sampling(**values: Any) -> dict[str, Any]:
    return {"text_input": HELLO, "sampling_parameters": json.dumps(values)}


def raw(content: str) -> dict[str, Any]:
    return {"text_input": HELLO, "sampling_parameters": content}


# The request, and what the error has to say.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"text_input": ""}, "text_input must be at least 1 character"),
    "no text_input": (raw("{}") | {"text_input": None}, "text_input is required"),
    "prompt too long": ({"text_input": " a" * 1024}, "1024 tokens; it must have at most 1023"),
    "prompt much too long": ({"text_input": " a" * 100_000}, "it must have at most 1023"),
    "prompt of 2 MiB": ({"text_input": "a" * (2 << 20)}, "text_input must have at most 1048576 bytes, got 2097152"),
    "broken JSON": (raw("{"), "sampling_parameters must be a JSON object"),
    "JSON text after the object": (raw("{} {}"), "Extra data at character 3"),
    "JSON list": (raw("[1]"), "sampling_parameters must be a JSON object, got list"),
    "JSON nested too deeply": (raw("[" * 10_000), "nested too deeply"),
    "JSON of 1 MiB": (raw(" " * (1 << 20)), "sampling_parameters must have at most 262144 bytes"),
    "duplicate key": (raw('{"seed": 1, "seed": 2}'), "must not repeat a key, got 'seed' twice"),
    "NaN": (raw('{"temperature": NaN}'), "finite numbers only, got NaN"),
    "NaN as text": (sampling(temperature="nan"), "temperature must be a number in [0, 100]"),
    "overflowing number": (raw('{"temperature": 1e999}'), "temperature must be a number in [0, 100]"),
    "lone surrogate": (raw('{"stop": "\\ud800"}'), "lone surrogate"),
    "unknown parameter": (sampling(temprature=1), "'temprature', did you mean 'temperature'"),
    "unknown parameter unlike any": (sampling(zzz=1), "unknown sampling parameter 'zzz'"),
    "temperature below 0": (sampling(temperature=-0.1), "temperature must be a number in [0, 100], got -0.1"),
    "temperature a list": (sampling(temperature=[]), "temperature must be a number in [0, 100], got []"),
    "temperature true": (sampling(temperature=True), "temperature must be a number in [0, 100], got True"),
    "top_p 0": (sampling(top_p=0), "top_p must be a number in (0, 1], got 0"),
    "top_p above 1": (sampling(top_p=1.0001), "top_p must be a number in (0, 1], got 1.0001"),
    "top_k below -1": (sampling(top_k=-2), "top_k must be an integer in"),
    "top_k fractional": (sampling(top_k=1.5), "top_k must be an integer in"),
    "min_p above 1": (sampling(min_p=1.1), "min_p must be a number in [0, 1]"),
    "presence_penalty": (sampling(presence_penalty=2.1), "presence_penalty must be a number in [-2, 2]"),
    "frequency_penalty": (sampling(frequency_penalty=-2.1), "frequency_penalty must be a number in [-2, 2]"),
    "repetition_penalty 0": (sampling(repetition_penalty=0), "repetition_penalty must be a number in"),
    "max_tokens 0": (sampling(max_tokens=0), "max_tokens must be an integer in"),
    "max_tokens not a number": (sampling(max_tokens="many"), "max_tokens must be an integer in"),
    "max_tokens huge": (sampling(max_tokens=2**63), "max_tokens must be an integer in"),
    "min_tokens above max_tokens": (sampling(min_tokens=9, max_tokens=8), "min_tokens must be at most max_tokens"),
    "seed too large": (sampling(seed=2**64), "seed must be an integer in"),
    "logprobs above the limit": (sampling(logprobs=21), "logprobs must be in [0, 20]"),
    "n above the limit": (sampling(n=65), "n must be an integer in [1, 64], got 65"),
    "ignore_eos a word": (sampling(ignore_eos="maybe"), "ignore_eos must be true or false"),
    "stop a number": (sampling(stop=3), "stop must be"),
    "stop with an empty text": (sampling(stop=[""]), "stop must hold texts of 1 to"),
    "stop_token_ids beyond the vocabulary": (sampling(stop_token_ids=[49152]), "stop_token_ids must"),
    "stop_token_ids negative": (sampling(stop_token_ids=[-1]), "stop_token_ids must"),
    "logit_bias beyond the vocabulary": (
        sampling(logit_bias={"49152": 1}),
        "logit_bias must be in [0, 49151], got 49152",
    ),
    "logit_bias too large": (sampling(logit_bias={"1": 101}), "logit_bias must have numbers in [-100, 100]"),
    "allowed_token_ids empty": (sampling(allowed_token_ids=[]), "allowed_token_ids must hold at least 1 id"),
    "allowed_token_ids beyond the vocabulary": (sampling(allowed_token_ids=[49152]), "allowed_token_ids must be in"),
    "nothing left to draw": (sampling(allowed_token_ids=[2], min_tokens=1), "allowed_token_ids must hold a token that"),
    "bad_words a text": (sampling(bad_words="x"), "bad_words must be a list of texts, got 'x'"),
    "truncate_prompt_tokens 0": (sampling(truncate_prompt_tokens=0), "truncate_prompt_tokens must be -1 or at least 1"),
    "prompt_logprobs": (sampling(prompt_logprobs=1), "prompt_logprobs is not supported in this version"),
    "structured_outputs": (sampling(structured_outputs="{}"), "structured_outputs is not supported in this version"),
    "priority": (sampling(priority=2**31), "priority must be an integer in [-2147483648, 2147483647]"),
    "tenant": (sampling(tenant="x" * 129), "tenant must be a text of at most 128 characters"),
    "image": ({"text_input": HELLO, "image": ["aGk="]}, "image must be left out: model llm takes text only"),
    "embedding_request": ({"embedding_request": "{}"}, "Model llm does not support 'embed' request"),
    "messages not a list": ({"messages": '{"role": "user"}'}, "messages must be a JSON list, got dict"),
    "messages empty": ({"messages": "[]"}, "messages must hold at least 1 message"),
    "message without role": ({"messages": '[{"content": "Hi"}]'}, "messages[0] must be an object with a text as role"),
    "two prompts": ({"text_input": HELLO, "input_ids": [1]}, "one of text_input, messages, input_ids must be sent"),
    "input_ids negative": ({"input_ids": [1, -1]}, "input_ids must be token ids (integers from 0 up), got -1"),
    "input_ids beyond the vocabulary": ({"input_ids": [49152]}, "prompt_token_ids must be in [0, 49151], got 49152"),
    "lora_name": (sampling(lora_name="doll"), "LoRA feature is not enabled."),
    "streaming with the prompt": (
        {"text_input": HELLO, "stream": True, "exclude_input_in_output": False},
        "When streaming, `exclude_input_in_output` = False is not allowed.",
    ),
}


@pytest.fixture(scope="module")
def neighbours(server: TritonServer) -> Iterator[None]:
    """Good requests, one after another, beside all of the bad ones; each must get the text it gets alone."""
    inputs = {
        "text_input": "Once upon a time",
        "stream": True,
        "sampling_parameters": '{"temperature": 0, "max_tokens": 32}',
    }
    alone = generate_grpc(server.grpc_url, inputs)
    assert len(alone.texts) == 32
    answers: list[Answer] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answers.append(generate_grpc(server.grpc_url, inputs))

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    done.set()
    thread.join()
    assert answers
    assert {(answer.text, answer.error) for answer in answers} == {(alone.text, None)}


@pytest.mark.parametrize("way", ["http", "http stream", "grpc"])
@pytest.mark.parametrize("name", BAD)
def test_one_clear_error(server: TritonServer, neighbours: None, name: str, way: str) -> None:
    inputs, expected = BAD[name]
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if way == "grpc":
        answer = generate_grpc(server.grpc_url, inputs)
        assert answer.error is not None
    else:
        if way == "http stream":
            inputs = {"stream": True} | inputs
        answer = generate(server.http_url, inputs, stream=way == "http stream")
        assert answer.code == "INVALID_ARG"
        assert answer.error is not None
    assert expected in answer.error
    assert answer.texts == []
    assert len(answer.error) < 1000


def test_invalid_utf8(server: TritonServer, neighbours: None) -> None:
    for data, position in ((b"\xff", 0), (b"caf\xc3", 3), (b"\xed\xa0\x80", 0), (b"ab\xc0\xaf", 2)):
        answer = generate_grpc(server.grpc_url, {"text_input": data})
        assert f"text_input must be valid UTF-8, got byte 0x{data[position]:02x} at {position}" in (answer.error or "")
        body = b'{"text_input": "' + data + b'"}'
        answer = generate(server.http_url, body)
        assert answer.code == "INVALID_ARG"
        assert answer.error


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "text_input is required"),
        ({"text_input": ["a", "b"]}, "text_input"),
        ({"text_input": HELLO, "temprature": 0}, "did you mean 'temperature'"),
        ({"text_input": HELLO, "stop": ["a"]}, "stop"),
        ({"text_input": HELLO, "temperature": -1}, "temperature must be a number in [0, 100], got -1"),
    ],
)
def test_bad_http_bodies(server: TritonServer, neighbours: None, body: dict[str, Any], reason: str) -> None:
    answer = generate(server.http_url, body)
    assert answer.code == "INVALID_ARG"
    assert reason in (answer.error or "")


@pytest.mark.parametrize("body", [{"text_input": 3}, {"stream": "yes"}, {"sampling_parameters": {"top_k": 1}}])
def test_wrong_json_types_are_tritons_to_refuse(server: TritonServer, neighbours: None, body: dict[str, Any]) -> None:
    """They never reach the model."""
    answer = generate(server.http_url, {"text_input": HELLO} | body)
    assert answer.error
    assert not answer.texts


def test_wrong_shapes_are_tritons_to_refuse(server: TritonServer, neighbours: None) -> None:
    for name, value in (("text_input", ["a", "b"]), ("stream", [True, False])):
        answer = generate_grpc(server.grpc_url, {"text_input": HELLO, name: value})
        assert f"unexpected shape for input '{name}'" in (answer.error or "")
