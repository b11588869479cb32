"""Overload, deadlines and priorities over the wire: the codes and texts that a client gets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import GrpcStream, generate, grpc_stream, metric, send_until_running, wait_until
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
        send_until_running(server, stream, inputs, 4)
        yield stream
        stream.cancel()
        wait_until(lambda: gauge(server, "running") + gauge(server, "waiting") == 0)


def refusal(server: TritonServer, inputs: dict[str, Any], **send: Any) -> str:
    """The text of the error that a request gets, which has the code UNAVAILABLE. (Over HTTP, Triton answers 400 to any code.)"""
    with grpc_stream(server.grpc_url, ends_with_code=True) as stream:
        stream.send(inputs, **send)
        with pytest.raises(InferenceServerException) as raised:
            stream.next()
    assert raised.value.status() == "StatusCode.UNAVAILABLE"
    return str(raised.value.message())


def test_a_full_queue_answers_unavailable_with_the_numbers(small_server: TritonServer) -> None:
    growth = Growth(small_server)
    size = (
        "Error generating stream: the queue is full: 3 requests are waiting, and max_queue_size is 3; try again later"
    )
    tokens = "requests with 1000 prompt tokens are waiting, this one has 600, and max_queue_tokens is 1500"
    with busy(small_server):
        with grpc_stream(small_server.grpc_url) as queued:
            for _ in range(3):
                queued.send(HELLO)
            wait_until(lambda: gauge(small_server, "waiting") == 3)
            assert refusal(small_server, HELLO) == size
            assert generate(small_server.http_url, HELLO).error == size
            queued.cancel()
        wait_until(lambda: gauge(small_server, "waiting") == 0)
        with grpc_stream(small_server.grpc_url) as queued:
            queued.send(HELLO | {"text_input": " a" * 1000})
            wait_until(lambda: gauge(small_server, "waiting") == 1)
            assert tokens in refusal(small_server, HELLO | {"text_input": " a" * 600})
            queued.cancel()
    growth.wait_for("pagedcore:requests_refused_total", 2, reason="queue_size")
    growth.wait_for("pagedcore:requests_refused_total", 1, reason="queue_tokens")
    assert growth.of("pagedcore:requests_refused_total", reason="internal") == 0
    assert generate(small_server.http_url, HELLO).error is None


ENDLESS = {"text_input": "Hello", "sampling_parameters": '{"max_tokens": 900, "ignore_eos": true}'}


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_request_ends_at_its_deadline(small_server: TritonServer, state: str) -> None:
    """Triton's own request timeout, in microseconds."""
    growth = Growth(small_server)
    if state == "running":
        error = refusal(small_server, ENDLESS, timeout=400_000)
    else:
        with busy(small_server):
            error = refusal(small_server, ENDLESS, timeout=400_000)
            assert gauge(small_server, "running") == 4
    found = re.search(r"deadline of 400 ms exceeded after (\d+) ms \((\w+), (\d+) tokens generated\)", error)
    assert found is not None, error
    assert found[2] == state
    assert (int(found[3]) > 0) == (state == "running")
    growth.wait_for("pagedcore:requests_expired_total", 1)
    wait_until(lambda: gauge(small_server, "running") + gauge(small_server, "waiting") == 0)


@pytest.mark.parametrize("sampling", [{}, {"sampling_parameters": ENDLESS["sampling_parameters"]}])
def test_the_timeout_of_an_http_request_is_a_deadline_too(small_server: TritonServer, sampling: dict[str, str]) -> None:
    body: dict[str, Any] = {
        "text_input": "Hello",
        **(sampling if sampling else {"max_tokens": 900, "ignore_eos": True}),
    }
    error = generate(small_server.http_url, body | {"timeout": 300_000}).error
    assert error is not None and "deadline of 300 ms exceeded after" in error
    error = generate(small_server.http_url, body | {"timeout": -1}).error
    assert (
        error is not None and "timeout must be an integer in [0, 9223372036854775807] (microseconds), got -1" in error
    )


def test_an_urgent_request_goes_first_and_takes_the_row_of_a_less_urgent_one(small_server: TritonServer) -> None:
    urgent = HELLO | {"sampling_parameters": '{"max_tokens": 4, "temperature": 0, "priority": -1}'}
    alone = generate(small_server.http_url, urgent)
    assert alone.error is None
    with busy(small_server), grpc_stream(small_server.grpc_url) as stream:
        stream.send(HELLO)
        wait_until(lambda: gauge(small_server, "waiting") == 1)
        assert generate(small_server.http_url, urgent) == alone
        wait_until(lambda: gauge(small_server, "waiting") == 1)
        stream.cancel()
        wait_until(lambda: gauge(small_server, "waiting") == 0)
        assert stream.arrived() == [], "the one that is only as urgent as those that run has waited"
        assert gauge(small_server, "running") == 4
