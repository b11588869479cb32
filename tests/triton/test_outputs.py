"""Every output of the wire contract from the real server, with transformers as the judge of tokens and log probabilities."""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import MODEL, TIMEOUT, Response, generate, metric, responses_of
from tests.triton.judge import Continuation, Judge

PROMPT = "The capital of France is"
NUM_TOKENS = 12
FLAGS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens", "token_ids")
EVERYTHING = {f"return_{name}": True for name in FLAGS}


@pytest.fixture(scope="module")
def reference(judge: Judge) -> Continuation:
    return judge.continuation(PROMPT, NUM_TOKENS)


def ask(server: TritonServer, *, stream: bool, sampling: dict[str, Any] | None = None, **inputs: Any) -> list[Response]:
    params = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True} | (sampling or {})
    prompt = {} if "input_ids" in inputs else {"text_input": PROMPT}
    inputs = prompt | {"stream": stream, "sampling_parameters": json.dumps(params)} | inputs
    return responses_of(server.grpc_url, inputs)


def test_the_model_declares_the_whole_contract(server: TritonServer) -> None:
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{MODEL}/config", timeout=TIMEOUT) as response:
        config = json.load(response)
    inputs = {tensor["name"]: (tensor["data_type"], tensor["dims"], tensor["optional"]) for tensor in config["input"]}
    outputs = {tensor["name"]: (tensor["data_type"], tensor["dims"]) for tensor in config["output"]}
    text, flag = ("TYPE_STRING", [1], True), ("TYPE_BOOL", [1], True)
    assert inputs == {
        **dict.fromkeys(("text_input", "messages", "sampling_parameters", "embedding_request"), text),
        **dict.fromkeys(("stream", "exclude_input_in_output", *EVERYTHING, "return_prompt_logprobs"), flag),
        "image": ("TYPE_STRING", [-1], True),
        "input_ids": ("TYPE_INT32", [-1], True),
    }
    assert outputs == {
        **dict.fromkeys(("text_output", "finish_reason", "logprobs", "token_ids"), ("TYPE_STRING", [-1])),
        "cumulative_logprob": ("TYPE_FP32", [-1]),
        "num_input_tokens": ("TYPE_UINT32", [1]),
        "num_output_tokens": ("TYPE_UINT32", [-1]),
        "prompt_logprobs": ("TYPE_STRING", [1]),
    }
    assert config["model_transaction_policy"]["decoupled"] is True
    assert config["max_batch_size"] == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_additional_outputs(server: TritonServer, reference: Continuation, stream: bool, logprobs: int | None) -> None:
    """All six at once: types, shapes, and the values of every response."""
    responses = ask(server, stream=stream, sampling={} if logprobs is None else {"logprobs": logprobs}, **EVERYTHING)
    assert len(responses) == (NUM_TOKENS if stream else 1)
    done = 0
    for response in responses:
        assert response.types == {
            **{name: ("BYTES", [1]) for name in ("text_output", "finish_reason", "logprobs", "token_ids")},
            "cumulative_logprob": ("FP32", [1]),
            "num_input_tokens": ("UINT32", [1]),
            "num_output_tokens": ("UINT32", [1]),
        }
        values = {name: value[0] for name, value in response.values.items()}
        count = 1 if stream else NUM_TOKENS
        new = reference.token_ids[done : done + count]
        done += count
        assert values["text_output"] == ("" if stream else PROMPT) + "".join(reference.pieces[done - count : done])
        assert values["finish_reason"] == ("length" if response.final else "None")
        assert values["num_input_tokens"] == len(reference.prompt_ids)
        assert values["num_output_tokens"] == count
        assert json.loads(values["token_ids"]) == new
        total = sum(reference.logprobs[i][reference.token_ids[i]] for i in range(done))
        assert values["cumulative_logprob"] == pytest.approx(total, abs=2e-3)
        positions = json.loads(values["logprobs"])
        if logprobs is None:
            assert positions is None
            continue
        assert len(positions) == count
        for i, position in enumerate(positions, start=done - count):
            check_position(position, reference, i, logprobs)


def check_position(position: dict[str, Any], reference: Continuation, i: int, num_logprobs: int) -> None:
    """The drawn token and the most likely ones, which greedily are the same one at rank 1."""
    expected = sorted(range(len(reference.logprobs[i])), key=lambda token: -reference.logprobs[i][token])
    ranked = expected[: max(1, num_logprobs)]
    assert list(position) == [str(token) for token in ranked]
    for rank, token in enumerate(ranked, start=1):
        entry = position[str(token)]
        assert entry["rank"] == rank
        assert entry["logprob"] == pytest.approx(reference.logprobs[i][token], abs=1e-3)
    assert position[str(reference.token_ids[i])]["decoded_token"] == reference.pieces[i]


def test_a_drawn_token_has_its_rank_and_the_most_likely_ones_follow(server: TritonServer) -> None:
    sampling = {"temperature": 8.0, "seed": 3, "logprobs": 2, "ignore_eos": False}
    (response,) = ask(server, stream=False, sampling=sampling, return_logprobs=True, return_token_ids=True)
    positions = json.loads(response.values["logprobs"][0])
    token_ids = json.loads(response.values["token_ids"][0])
    assert [int(next(iter(position))) for position in positions] == token_ids
    assert all(len(position) == 3 for position in positions if next(iter(position.values()))["rank"] > 2)
    assert any(next(iter(position.values()))["rank"] > 2 for position in positions)
    assert all(sorted(entry["rank"] for entry in position.values())[:2] == [1, 2] for position in positions)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("sampling", [{}, {"n": 3, "temperature": 1.0, "seed": 1}, {"stop": ["no such text"]}])
def test_log_probabilities_of_the_prompt(
    server: TritonServer, judge: Judge, stream: bool, sampling: dict[str, Any]
) -> None:
    """In the first response, whether or not the prefix cache knows the prompt; in the others there is null."""
    expected = judge.prompt_logprobs(PROMPT)
    for number in (0, 3, None):
        params = sampling | {"prompt_logprobs": number}
        responses = ask(server, stream=stream, sampling=params, return_prompt_logprobs=True)
        assert len(responses) == (NUM_TOKENS if stream else 1)
        assert all(response.types["prompt_logprobs"] == ("BYTES", [1]) for response in responses)
        first, *others = [json.loads(response.values["prompt_logprobs"][0]) for response in responses]
        assert not any(others)
        if number is None:
            assert first is None
            continue
        check_prompt(first, expected, number)


def check_prompt(positions: list[Any], expected: Continuation, num_top: int) -> None:
    """The prompt's own token first, then the most likely ones. No two logits of this prompt's lie within the tolerance."""
    assert positions[0] is None and len(positions) == 1 + len(expected.token_ids)
    for position, token_id, piece, row in zip(
        positions[1:], expected.token_ids, expected.pieces, expected.logprobs, strict=True
    ):
        order = sorted(range(len(row)), key=lambda token: -row[token])
        assert list(position) == [str(token) for token in dict.fromkeys([token_id, *order[:num_top]])]
        for token, entry in position.items():
            assert entry["rank"] == 1 + sum(value > row[int(token)] for value in row)
            assert entry["logprob"] == pytest.approx(row[int(token)], abs=1e-4)
        assert position[str(token_id)]["decoded_token"] == piece


def test_a_prompts_log_probabilities_need_parameter_and_flag(server: TritonServer) -> None:
    """Either alone changes no response of a client that knows only vllm_backend's outputs."""
    (flagless,) = ask(server, stream=False, sampling={"prompt_logprobs": 1})
    assert set(flagless.values) == {"text_output"}
    (numberless,) = ask(server, stream=False, return_prompt_logprobs=True)
    assert numberless.values["prompt_logprobs"] == ["null"]
    (best, *_) = ask(
        server,
        stream=True,
        sampling={"prompt_logprobs": 0, "n": 1, "best_of": 2, "temperature": 1.0, "detokenize": False},
        return_prompt_logprobs=True,
    )
    positions = json.loads(best.values["prompt_logprobs"][0])
    assert [entry["decoded_token"] for position in positions[1:] for entry in position.values()] == [None] * (
        len(positions) - 1
    )


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_of_the_prompt_over_http(server: TritonServer, judge: Judge, stream: bool) -> None:
    params = {"temperature": 0, "max_tokens": 3, "ignore_eos": True, "prompt_logprobs": 2}
    body = {"text_input": PROMPT, "stream": stream, "sampling_parameters": json.dumps(params)}
    body["return_prompt_logprobs"] = True
    url = f"http://{server.http_url}/v2/models/{MODEL}/generate{'_stream' if stream else ''}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=TIMEOUT) as response:
        content = response.read().decode()
    events = [json.loads(line.removeprefix("data: ")) for line in content.splitlines() if line]
    assert [event["prompt_logprobs"] for event in events[1:]] == ["null"] * (2 if stream else 0)
    check_prompt(json.loads(events[0]["prompt_logprobs"]), judge.prompt_logprobs(PROMPT), 2)


def test_a_prompt_in_chunks_beside_others_has_the_same_log_probabilities(
    server: TritonServer, small_server: TritonServer
) -> None:
    """Of 32 tokens a step, in a pool where requests are preempted, from several clients at once."""
    inputs = {
        "text_input": "Of all the ships that ever left this harbour, " * 25,
        "sampling_parameters": json.dumps(
            {"temperature": 0, "max_tokens": 220, "ignore_eos": True, "prompt_logprobs": 2}
        ),
        "return_prompt_logprobs": True,
    }
    (whole,) = responses_of(server.grpc_url, inputs)
    preempted = metric(small_server.metrics_url, "vllm:num_preemptions_total")
    with ThreadPoolExecutor(3) as clients:  # as many as may wait at once
        found = list(clients.map(lambda _: responses_of(small_server.grpc_url, inputs), range(3)))
    assert metric(small_server.metrics_url, "vllm:num_preemptions_total") > preempted
    assert len(json.loads(whole.values["prompt_logprobs"][0])) > 200
    assert [response.values["prompt_logprobs"] for (response,) in found] == [whole.values["prompt_logprobs"]] * 3


@pytest.mark.parametrize("stream", [True, False])
def test_an_output_is_there_if_and_only_if_asked_for(server: TritonServer, stream: bool) -> None:
    """Every subset of upstream's five flags."""
    names = FLAGS[:5]
    for wanted in itertools.product([False, True], repeat=len(names)):
        flags = {f"return_{name}": value for name, value in zip(names, wanted, strict=True)}
        responses = ask(server, stream=stream, sampling={"max_tokens": 2}, **flags)
        expected = {"text_output", *(name for name, value in zip(names, wanted, strict=True) if value)}
        assert [set(response.values) for response in responses] == [expected] * (2 if stream else 1)


def test_only_requested_outputs_are_sent(server: TritonServer) -> None:
    inputs = {"text_input": PROMPT, "return_num_output_tokens": True, "return_finish_reason": True}
    (response,) = responses_of(server.grpc_url, inputs, outputs=["num_output_tokens"])
    assert set(response.values) == {"num_output_tokens"}


def test_finish_reason_and_counts_when_a_stop_ends_the_text(server: TritonServer, reference: Continuation) -> None:
    """A stop string counts up to the token that completed it, a stop token counts itself; neither is shown."""
    text = reference.text
    stop = text[9:14]
    count = next(n for n in range(NUM_TOKENS + 1) if stop in "".join(reference.pieces[:n]))
    for sampling, shown, tokens in (
        ({"stop": [stop]}, text.partition(stop)[0], count),
        ({"stop_token_ids": [reference.token_ids[4]]}, "".join(reference.pieces[:4]), 5),
    ):
        for stream in (True, False):
            responses = ask(server, stream=stream, sampling=sampling, exclude_input_in_output=True, **EVERYTHING)
            values = [{name: value[0] for name, value in response.values.items()} for response in responses]
            assert "".join(value["text_output"] for value in values) == shown
            assert [value["finish_reason"] for value in values] == ["None"] * (len(values) - 1) + ["stop"]
            assert sum(value["num_output_tokens"] for value in values) == tokens
            ids = [token_id for value in values for token_id in json.loads(value["token_ids"])]
            assert ids == reference.token_ids[:tokens]
            assert len(responses) == (tokens if stream else 1)


def drawn(server: TritonServer, stream: bool, **sampling: Any) -> list[Response]:
    """Three draws with everything returned."""
    params = {"n": 3, "temperature": 1.0, "seed": 11, "logprobs": 1, "ignore_eos": False, "max_tokens": 24}
    return ask(server, stream=stream, sampling=params | sampling, exclude_input_in_output=True, **EVERYTHING)


def test_several_outputs_have_an_element_each_in_their_order(server: TritonServer) -> None:
    """Streamed: a response per step, the texts adding up to those of the one response without streaming."""
    (whole,) = drawn(server, stream=False)
    pieces = drawn(server, stream=True)
    assert len(set(whole.values["text_output"])) == 3
    assert [len(value) for value in whole.values.values()] == [
        1 if n == "num_input_tokens" else 3 for n in whole.values
    ]
    counts = whole.values["num_output_tokens"]
    assert len(pieces) == max(counts)
    for index in range(3):
        parts = [
            {name: response.values[name][index % len(response.values[name])] for name in FLAGS} for response in pieces
        ]
        texts = [response.values["text_output"][index] for response in pieces]
        assert "".join(texts) == whole.values["text_output"][index]
        assert [part["num_output_tokens"] for part in parts] == [1] * counts[index] + [0] * (
            len(pieces) - counts[index]
        )
        ids = [token_id for part in parts for token_id in json.loads(part["token_ids"])]
        assert ids == json.loads(whole.values["token_ids"][index])
        positions = [position for part in parts for position in json.loads(part["logprobs"])]
        assert positions == json.loads(whole.values["logprobs"][index])
        total = sum(position[str(token_id)]["logprob"] for position, token_id in zip(positions, ids, strict=True))
        assert parts[-1]["cumulative_logprob"] == pytest.approx(total, abs=1e-3)
        assert parts[-1]["finish_reason"] == whole.values["finish_reason"][index] != "None"
    single = drawn(server, stream=False, n=1)[0]
    assert single.values["text_output"] == whole.values["text_output"][:1]


def test_greedy_outputs_are_the_same_and_each_has_the_prompt(server: TritonServer, reference: Continuation) -> None:
    (response,) = ask(server, stream=False, sampling={"n": 2})
    assert response.values["text_output"] == [PROMPT + reference.text] * 2
    body = {"text_input": PROMPT, "n": 2, "max_tokens": NUM_TOKENS, "temperature": 0, "exclude_input_in_output": True}
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{MODEL}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=TIMEOUT) as http_response:
        assert json.load(http_response)["text_output"] == [reference.text] * 2


def test_a_stop_string_ends_one_output_of_several(server: TritonServer, all_blocks_free: Callable[[], bool]) -> None:
    (free,) = drawn(server, stream=False)
    texts = free.values["text_output"]
    stop = next(texts[1][i : i + 6] for i in range(4, 40) if all(texts[1][i : i + 6] not in texts[k] for k in (0, 2)))
    for stream in (True, False):
        responses = drawn(server, stream=stream, stop=[stop])
        joined = ["".join(response.values["text_output"][index] for response in responses) for index in range(3)]
        assert joined == [texts[0], texts[1].partition(stop)[0], texts[2]]
        assert responses[-1].values["finish_reason"][1] == "stop"


def test_the_best_outputs_of_more_draws_come_at_the_end(server: TritonServer) -> None:
    """Best first, also with a stream, which has one response then."""
    sums = drawn(server, stream=False, n=4)[0].values["cumulative_logprob"]
    responses = drawn(server, stream=True, n=2, best_of=4)
    assert [response.final for response in responses] == [True]
    assert responses[0].values["cumulative_logprob"] == pytest.approx(sorted(sums, reverse=True)[:2], abs=1e-3)


def test_beams_are_those_of_transformers(server: TritonServer, judge: Judge) -> None:
    sampling = {"beam_width": 3, "n": 2, "ignore_eos": False}
    for stream in (True, False):
        (response,) = ask(
            server, stream=stream, sampling=sampling, exclude_input_in_output=True, return_cumulative_logprob=True
        )
        assert response.values["text_output"] == judge.beams(PROMPT, 3, 2, NUM_TOKENS)
        best, second = response.values["cumulative_logprob"]
        assert 0 > best >= second


@pytest.mark.parametrize("stream", [True, False])
def test_http_has_the_same_values_as_fields(server: TritonServer, reference: Continuation, stream: bool) -> None:
    body = {
        "text_input": PROMPT,
        "stream": stream,
        "exclude_input_in_output": True,
        "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": NUM_TOKENS}),
        **EVERYTHING,
    }
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/{MODEL}/generate{'_stream' if stream else ''}", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        content = response.read().decode()
    events = [json.loads(line.removeprefix("data: ")) for line in content.splitlines() if line]
    assert len(events) == (NUM_TOKENS if stream else 1)
    for event in events:
        assert set(event) == {"model_name", "model_version", "text_output", *FLAGS}
        assert event["num_input_tokens"] == len(reference.prompt_ids)
    assert "".join(event["text_output"] for event in events) == reference.text
    assert sum(event["num_output_tokens"] for event in events) == NUM_TOKENS
    assert [event["finish_reason"] for event in events] == ["None"] * (len(events) - 1) + ["length"]


def test_a_prompt_of_token_ids_continues_as_its_text(server: TritonServer, reference: Continuation) -> None:
    (plain,) = ask(server, stream=False, input_ids=reference.prompt_ids, return_num_input_tokens=True)
    assert plain.values == {
        "text_output": [reference.text],
        "num_input_tokens": [len(reference.prompt_ids)],
    }
    (echoed,) = ask(server, stream=False, input_ids=reference.prompt_ids, exclude_input_in_output=False)
    assert echoed.values["text_output"] == [PROMPT + reference.text]
    body = {"input_ids": reference.prompt_ids, "max_tokens": NUM_TOKENS, "temperature": 0}
    assert generate(server.http_url, body).text == reference.text


def test_the_same_request_has_the_same_number_of_responses(server: TritonServer) -> None:
    """One per token, whether or not the token completes a character."""
    inputs = {"text_input": "Emoji only: 🙂🎉", "stream": True, "return_num_output_tokens": True}
    inputs["sampling_parameters"] = json.dumps({"temperature": 0, "max_tokens": 40, "ignore_eos": True})
    first, second = (responses_of(server.grpc_url, inputs) for _ in range(2))
    assert len(first) == len(second) == 40
    assert [response.values for response in first] == [response.values for response in second]
    assert {response.values["num_output_tokens"][0] for response in first} == {1}
