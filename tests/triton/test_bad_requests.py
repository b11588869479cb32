"""Every bad request gets one INVALID_ARG that names what is wrong, and its neighbours do not notice."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedcore.serve.triton_server import TritonServer
from tests.triton.bad_inputs import BAD_INPUTS, HELLO, BadInput
from tests.triton.clients import Answer, generate, generate_grpc, infer_request, stream_infer

# A model answers within milliseconds; this only tells an answer from a server that is busy with the bad request.
MAX_SECONDS = 10.0


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


def resident_mib(process: int) -> float:
    num_pages = int(Path("/proc", str(process), "statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def check(bad: BadInput, error: str | None) -> None:
    assert error is not None
    for part in (bad.field, bad.allowed, bad.given):
        assert part in error
    assert len(error) < 1000
    assert error.isascii() and error.isprintable()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_one_clear_error_over_http(server: TritonServer, neighbours: None, name: str, stream: bool) -> None:
    bad = BAD_INPUTS[name]
    begin = time.monotonic()
    answer = generate(server.http_url, {"stream": stream} | bad.inputs, stream=stream)
    assert time.monotonic() - begin < MAX_SECONDS
    check(bad, answer.error)
    assert (answer.code, answer.texts, answer.num_responses) == ("INVALID_ARG", [], 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_one_clear_error_over_grpc(server: TritonServer, neighbours: None, name: str, stream: bool) -> None:
    """The stream has that one response and ends."""
    bad = BAD_INPUTS[name]
    (response,) = stream_infer(server.grpc_url, [infer_request({"stream": stream} | bad.inputs)], timeout=MAX_SECONDS)
    check(bad, response.error_message)
    assert not response.infer_response.outputs


def test_refused_prompts_leave_no_memory_behind(server: TritonServer) -> None:
    """Every id is a new one, and each of the 64 outputs would have to know the end of the prompt."""

    def ask(number: int) -> None:
        first = (number << 20) + (1 << 24)
        inputs = {"input_ids": list(range(first, first + (1 << 20))), "sampling_parameters": '{"n": 64}'}
        assert "at most 1023" in (generate_grpc(server.grpc_url, inputs).error or "")

    (process,) = server.stub_processes()
    ask(0)
    before = resident_mib(process)
    for number in range(1, 4):
        ask(number)
    assert resident_mib(process) - before < 64


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
