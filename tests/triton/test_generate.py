"""Text from the real server: equal to transformers', however it is asked for and sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pagedcore.serve.default_model import ensure_default_model
from pagedcore.serve.triton_server import TritonServer
from pagedcore.text import load_tokenizer
from tests.triton.clients import TIMEOUT, generate, generate_grpc, grpc_stream, infer_request, stream_infer
from tests.triton.judge import Judge

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Ein Gedicht über 日本 und 🙂:"]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def expected(judge: Judge) -> dict[str, str]:
    """Greedy continuations of the prompts by transformers, as text after the prompt."""
    texts = {}
    for prompt in [*PROMPTS, chat_prompt()]:
        token_ids = judge.continuation(prompt, GREEDY["max_tokens"]).token_ids
        if judge.tokenizer.eos_token_id in token_ids:
            token_ids = token_ids[: token_ids.index(judge.tokenizer.eos_token_id)]
        texts[prompt] = judge.tokenizer.decode(token_ids, skip_special_tokens=True)
    return texts


def chat_prompt() -> str:
    messages = [{"role": "user", "content": "Say only the word yes."}]
    return load_tokenizer(ensure_default_model()).apply_chat_template(messages)


def ask(server: TritonServer, way: str, prompt: str, sampling: dict[str, Any], **more: Any) -> str:
    inputs = {"text_input": prompt, "sampling_parameters": json.dumps(sampling), **more}
    if way == "http":
        answer = generate(server.http_url, inputs)
    elif way == "http stream":
        answer = generate(server.http_url, inputs | {"stream": True}, stream=True)
    elif way == "grpc":
        answer = generate_grpc(server.grpc_url, inputs)
    else:
        answer = generate_grpc(server.grpc_url, inputs | {"stream": True})
    assert answer.error is None, answer.error
    assert "stream" in way or len(answer.texts) == 1
    return answer.text


@pytest.mark.parametrize("way", ["http", "http stream", "grpc", "grpc stream"])
@pytest.mark.parametrize("prompt", [*PROMPTS, chat_prompt()], ids=["text", "code", "unicode", "chat"])
def test_greedy_text_equals_transformers(server: TritonServer, expected: dict[str, str], prompt: str, way: str) -> None:
    echo = "" if "stream" in way else prompt
    assert ask(server, way, prompt, GREEDY) == echo + expected[prompt]


def test_the_prompt_is_left_out_on_request(server: TritonServer, expected: dict[str, str]) -> None:
    prompt = PROMPTS[0]
    for way in ("http", "grpc"):
        assert ask(server, way, prompt, GREEDY, exclude_input_in_output=True) == expected[prompt]
        assert ask(server, way, prompt, GREEDY, exclude_input_in_output=False) == prompt + expected[prompt]
    assert ask(server, "grpc stream", prompt, GREEDY, exclude_input_in_output=True) == expected[prompt]


def test_one_response_per_token_and_the_last_one_is_final(server: TritonServer) -> None:
    """Without an empty response after it, although the client asks for one."""
    inputs = {"text_input": PROMPTS[0], "sampling_parameters": json.dumps(GREEDY)}
    for _ in range(2):
        with grpc_stream(server.grpc_url) as stream:
            stream.send(inputs | {"stream": True}, request_id="a")
            responses = [stream.next() for _ in range(GREEDY["max_tokens"])]
            stream.send(inputs, request_id="b")
            after = stream.next()
        assert [final for _, _, final in responses] == [False] * (GREEDY["max_tokens"] - 1) + [True]
        assert all(len(texts) == 1 and texts[0] for _, texts, _ in responses)
        assert after[0] == "b"
        assert after[2]


def test_numbers_as_text_and_parameters_without_a_tensor(server: TritonServer, expected: dict[str, str]) -> None:
    prompt = PROMPTS[0]
    as_text = {"temperature": "0", "top_p": "1", "max_tokens": "24", "ignore_eos": "false"}
    whole = prompt + expected[prompt]
    assert ask(server, "grpc", prompt, as_text) == whole
    assert generate(server.http_url, {"text_input": prompt, **GREEDY}).text == whole
    assert generate(server.http_url, {"text_input": prompt, "parameters": as_text}).text == whole
    assert generate_grpc(server.grpc_url, {"text_input": prompt}, parameters=GREEDY).text == whole


def test_the_tensor_wins_over_parameters(server: TritonServer) -> None:
    inputs = {"text_input": PROMPTS[0], "stream": True, "sampling_parameters": '{"temperature": 0, "max_tokens": 2}'}
    answer = generate_grpc(server.grpc_url, inputs, parameters={"max_tokens": 9})
    assert len(answer.texts) == 2


@pytest.mark.parametrize("way", ["http", "http stream", "grpc stream"])
def test_a_stop_string_ends_the_text_and_frees_the_request(
    server: TritonServer, expected: dict[str, str], all_blocks_free: Callable[[], bool], way: str
) -> None:
    """Long before max_tokens; the stop string straddles tokens and is never shown."""
    prompt = PROMPTS[0]
    stop = expected[prompt][9:14]
    sampling = {"temperature": 0, "max_tokens": 900, "ignore_eos": True, "stop": ["never seen", stop]}
    echo = "" if "stream" in way else prompt
    assert ask(server, way, prompt, sampling) == echo + expected[prompt].partition(stop)[0]
    including = ask(server, way, prompt, sampling | {"include_stop_str_in_output": True})
    assert including == echo + expected[prompt].partition(stop)[0] + stop


def test_the_end_of_sequence_ends_the_text(server: TritonServer) -> None:
    sampling = {"temperature": 0, "max_tokens": 200}
    with grpc_stream(server.grpc_url) as stream:
        stream.send({"text_input": chat_prompt(), "stream": True, "sampling_parameters": json.dumps(sampling)})
        responses = [stream.next()]
        while not responses[-1][2]:
            responses.append(stream.next())
    assert len(responses) < 200
    assert "<|im_end|>" not in "".join(text for _, texts, _ in responses for text in texts)


@pytest.mark.parametrize("prompt", ["a\x00b", "\ufeffx", "\u202eabc", "e" + "\u0301" * 500, "👩‍👩‍👧‍👦"])
def test_any_unicode_prompt_comes_back(server: TritonServer, prompt: str) -> None:
    sampling = {"temperature": 0, "max_tokens": 1}
    assert ask(server, "grpc", prompt, sampling).startswith(prompt)
    assert ask(server, "http", prompt, sampling).startswith(prompt)


def test_a_prompt_that_leaves_room_for_one_token(server: TritonServer) -> None:
    prompt = " a" * 1023
    assert len(load_tokenizer(ensure_default_model()).encode(prompt)) == 1023
    sampling = '{"max_tokens": 50, "ignore_eos": true}'
    answer = generate_grpc(server.grpc_url, {"text_input": prompt, "stream": True, "sampling_parameters": sampling})
    assert answer.finals == (True,)


def test_a_large_answer_is_one_response(server: TritonServer) -> None:
    """Of some 100 KB, mostly log probabilities."""
    sampling = json.dumps({"max_tokens": 20, "n": 4, "logprobs": 20, "ignore_eos": True, "seed": 1})
    inputs = {"text_input": "Once", "return_logprobs": True, "sampling_parameters": sampling}
    answer = generate(server.http_url, inputs)
    assert (answer.error, answer.num_responses) == (None, 1)
    (response,) = stream_infer(server.grpc_url, [infer_request(inputs)], timeout=TIMEOUT)
    assert not response.error_message
    assert sum(map(len, response.infer_response.raw_output_contents)) > 100_000
    with grpc_stream(server.grpc_url) as stream:
        stream.send(inputs)
        first, last = stream.next_response(), stream.next_response()
    assert (first.final, last.final, last.values) == (False, True, {})
    assert len(first.values["text_output"]) == 4
