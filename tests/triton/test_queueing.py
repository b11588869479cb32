"""Overload, deadlines and priorities over the wire: the codes and texts that a client gets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import GrpcStream, generate, grpc_stream, metric, wait_until
from tests.triton.samples import Growth

HELLO: dict[str, Any] = {"text_input": "Hello", "sampling_parameters": '{"max_tokens": 4, "temperature": 0}'}


def gauge(server: TritonServer, name: str) -> float:
    return metric(server.metrics_url, f"vllm:num_requests_{name}")


@contextmanager
def busy(server: TritonServer, priority: int = 0) -> Iterator[GrpcStream]:
    """All four rows of the server are taken, by requests that do not end."""
    inputs = {
        "text_input": "Once upon a time",
        "stream": True,
        "sampling_parameters": f'{{"max_tokens": 900, "ignore_eos": true, "priority": {priority}}}',
    }
    with grpc_stream(server.grpc_url) as stream:
        for _ in range(4):
            stream.send(inputs)
        wait_until(lambda: gauge(server, "running") == 4)
        yield stream
        stream.cancel()
        wait_until(lambda: gauge(server, "running") + gauge(server, "waiting") == 0)


def test_a_full_queue_answers_unavailable_with_the_numbers(small_server: TritonServer) -> None:
    growth = Growth(small_server)
    with busy(small_server), grpc_stream(small_server.grpc_url) as queued:
        for _ in range(3):
            queued.send(HELLO)
        wait_until(lambda: gauge(small_server, "waiting") == 3)
        answer = generate(small_server.http_url, HELLO)
        assert answer.code == "UNAVAILABLE"
        assert answer.error == (
            "Error generating stream: the queue is full: 3 requests are waiting, and max_queue_size is 3; try again later"
        )
        queued.cancel()
        wait_until(lambda: gauge(small_server, "waiting") == 0)
        queued_anew = grpc_stream(small_server.grpc_url)
        with queued_anew as stream:
            stream.send(HELLO | {"text_input": " a" * 1000})
            wait_until(lambda: gauge(small_server, "waiting") == 1)
            answer = generate(small_server.http_url, HELLO | {"text_input": " a" * 600})
            stream.cancel()
    assert answer.code == "UNAVAILABLE"
    assert answer.error is not None
    assert re.search(
        "requests with 1000 prompt tokens are waiting, this one has 600, and max_queue_tokens is 1500", answer.error
    )
    for reason in ("queue_size", "queue_tokens"):
        growth.wait_for("pagedcore:requests_refused_total", 1, reason=reason)
    assert generate(small_server.http_url, HELLO).error is None


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_request_ends_at_its_deadline(small_server: TritonServer, state: str) -> None:
    """Triton's own request timeout, in microseconds."""
    growth = Growth(small_server)
    endless = {"text_input": "Hello", "sampling_parameters": '{"max_tokens": 900, "ignore_eos": true}'}

    def ask(stream: GrpcStream) -> str:
        stream.send(endless, timeout=400_000)
        with pytest.raises(InferenceServerException) as raised:
            stream.next()
        return str(raised.value.message())

    with grpc_stream(small_server.grpc_url) as stream:
        if state == "running":
            error = ask(stream)
        else:
            with busy(small_server):
                error = ask(stream)
                assert gauge(small_server, "running") == 4
    found = re.search(r"deadline of 400 ms exceeded after (\d+) ms \((\w+), (\d+) tokens generated\)", error)
    assert found is not None, error
    assert found[2] == state
    assert (int(found[3]) > 0) == (state == "running")
    growth.wait_for("pagedcore:requests_expired_total", 1)
    wait_until(lambda: gauge(small_server, "running") + gauge(small_server, "waiting") == 0)


def test_an_urgent_request_goes_first_and_takes_the_row_of_a_less_urgent_one(small_server: TritonServer) -> None:
    urgent = HELLO | {"sampling_parameters": '{"max_tokens": 4, "temperature": 0, "priority": -1}'}
    alone = generate(small_server.http_url, urgent)
    assert alone.error is None
    with busy(small_server), grpc_stream(small_server.grpc_url) as stream:
        stream.send(HELLO)
        wait_until(lambda: gauge(small_server, "waiting") == 1)
        assert generate(small_server.http_url, urgent) == alone
        assert gauge(small_server, "waiting") == 1, "the one that is as urgent as those that run still waits"
        stream.cancel()
