"""Random HTTP bodies and gRPC messages to a real tritonserver: it answers each in its own terms, and keeps nothing."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from pagedcore.serve.triton_server import TritonServer
from tests.fuzz.parser import configured
from tests.fuzz.strategies import (
    FIELDS,
    FLAGS,
    encoded,
    leaves,
    mostly,
    parameter_names,
    parameter_objects,
    texts,
    values,
)
from tests.triton.bad_inputs import BAD_INPUTS
from tests.triton.clients import MODEL, generate, generate_grpc, infer_request, stream_infer

TIMEOUT = 30.0
REFUSALS = (400, 404, 503)  # of HTTP
# Beginnings of a 500 by which Triton refuses a body that is no JSON or has another type than a tensor; no model sees it.
TRITONS_INTERNAL = (
    "failed to parse the request JSON buffer",
    "Unable to parse",
    "Expected JSON object",
    "attempt to get members",
    "Converting keyword: 'parameters'",
)
INPUT_NAMES = ("text_input", "messages", "input_ids", "sampling_parameters", *FLAGS, "image", "embedding_request", "x")
DATA_TYPES = ("BYTES", "BOOL", "INT32", "FP32", "INT64", "UINT8", "", "TEXT")
NEIGHBOUR = {
    "text_input": "Once upon a time",
    "stream": True,
    "sampling_parameters": '{"temperature": 0, "max_tokens": 32}',
}


# Whatever is taken ends after a few tokens: long outputs are for other tests.
_short = parameter_objects.map(lambda given: given | {"n": 1, "best_of": None, "max_tokens": 2, "min_tokens": 0})
_bodies = st.fixed_dictionaries(
    {"text_input": mostly(texts.filter(bool) | st.text(max_size=6), leaves), "max_tokens": st.just(2)},
    optional={
        "stream": mostly(st.booleans(), leaves),
        "exclude_input_in_output": mostly(st.booleans(), leaves),
        "sampling_parameters": mostly(encoded(_short), leaves),
        "id": texts,
        "parameters": mostly(st.dictionaries(parameter_names, leaves, max_size=2), values),
        "temperature": mostly(st.floats(0, 2), leaves),
        "stop": mostly(texts, values),
        "return_logprobs": mostly(st.booleans(), leaves),
        "return_prompt_logprobs": mostly(st.booleans(), leaves),
    },
)
http_bodies = mostly(encoded(_bodies).map(lambda text: text.encode(errors="replace")), st.binary(max_size=40))


def _contents(data_type: str) -> st.SearchStrategy[bytes]:
    if data_type != "BYTES":
        return st.binary(max_size=12)
    framed = st.one_of(encoded(_short), texts).map(lambda text: text.encode(errors="replace"))
    lengths = st.integers(0, 2**32 - 1)
    return st.one_of(
        framed.map(lambda data: len(data).to_bytes(4, "little") + data),
        st.builds(lambda length, data: length.to_bytes(4, "little") + data, lengths, framed),
        st.binary(max_size=8),
    )


@st.composite
def grpc_requests(draw: st.DrawFn) -> service_pb2.ModelInferRequest:
    """Mostly a good prompt beside tensors of any name, type, shape and content."""
    prompt = {"text_input": draw(texts.filter(bool))} if draw(st.integers(0, 3)) else {}
    limits = {"sampling_parameters": '{"max_tokens": 2}'} if draw(st.booleans()) else {}
    request = infer_request(prompt | limits, id=draw(texts), model_name=draw(st.sampled_from([MODEL] * 9 + ["x", ""])))
    for name in draw(st.lists(st.sampled_from(INPUT_NAMES), max_size=2)):
        data_type = draw(st.sampled_from(DATA_TYPES))
        shape = draw(st.sampled_from([[1], [1], [1], [2], [], [0], [-1], [1, 1], [2**62], [2**31]]))
        request.inputs.add(name=name, datatype=data_type, shape=shape)
        if draw(st.integers(0, 7)):
            request.raw_input_contents.append(draw(_contents(data_type)))
    for name in draw(st.lists(st.sampled_from([*FIELDS, "timeout", "priority", "sequence_id"]), max_size=2)):
        if name not in ("n", "best_of", "max_tokens", "min_tokens"):
            request.parameters[name].string_param = draw(texts)
    return request


def fuzz_http(server: TritonServer, num_cases: int, seed: int) -> Counter[str]:
    """How often each kind of answer came; raises AssertionError for one that is none of this interface's."""
    answers: Counter[str] = Counter()

    @configured(num_cases, seed)
    @hypothesis.given(http_bodies, st.booleans())
    def send(body: bytes, stream: bool) -> None:
        answers[check_http(server, body, stream)] += 1

    send()
    return answers


def check_http(server: TritonServer, body: bytes, stream: bool) -> str:
    """Post a body; returns the status as a text."""
    connection = http.client.HTTPConnection(server.http_url, timeout=TIMEOUT)
    try:
        connection.request("POST", f"/v2/models/{MODEL}/generate{'_stream' if stream else ''}", body)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    events = [json.loads(line.removeprefix(b"data: ")) for line in content.splitlines() if line]
    assert all(isinstance(event, dict) for event in events)
    assert response.status == 200 or "error" in events[-1]
    if response.status == 500 and events[-1]["error"].startswith(TRITONS_INTERNAL):
        return "500 of Triton's own"
    assert response.status == 200 or response.status in REFUSALS, f"{response.status}: {content[:300]!r}"
    return str(response.status)


def fuzz_grpc(server: TritonServer, num_cases: int, seed: int) -> Counter[str]:
    """How often each kind of answer came; raises AssertionError for one that is none of this interface's."""
    answers: Counter[str] = Counter()

    @configured(num_cases, seed)
    @hypothesis.given(grpc_requests())
    def send(request: service_pb2.ModelInferRequest) -> None:
        answers[check_grpc(server, request)] += 1

    send()
    return answers


def check_grpc(server: TritonServer, request: service_pb2.ModelInferRequest) -> str:
    """Send one message on a stream of its own, which must not end by itself; returns the kind of its answer."""
    responses = stream_infer(server.grpc_url, [request], timeout=TIMEOUT)
    assert responses, "no response at all"
    errors = [response.error_message for response in responses if response.error_message]
    assert len(errors) <= 1
    assert not any("internal error" in error for error in errors), errors
    return "refused" if errors else "answered"


@contextmanager
def neighbour(server: TritonServer) -> Iterator[None]:
    """A good request, again and again, which must get the text that it gets alone."""
    alone = generate_grpc(server.grpc_url, NEIGHBOUR).text
    faults: list[str] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answer = generate_grpc(server.grpc_url, NEIGHBOUR)
            if answer.text != alone:
                faults.append(answer.error or answer.text)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not faults, faults[0]


def refusal_seconds(server: TritonServer) -> list[float]:
    """How long every one of the table's bad inputs waits for its answer, by HTTP and by gRPC, streaming and not."""
    seconds = []
    for bad in BAD_INPUTS.values():
        for stream in (False, True):
            inputs: dict[str, Any] = {"stream": stream} | bad.inputs
            begin = time.perf_counter()
            assert generate(server.http_url, inputs, stream=stream).error
            seconds.append(time.perf_counter() - begin)
            request = infer_request(inputs)
            begin = time.perf_counter()
            (response,) = stream_infer(server.grpc_url, [request], timeout=TIMEOUT)
            seconds.append(time.perf_counter() - begin)
            assert response.error_message
    return seconds
