"""Parts of the wire contract that are Triton's own, or lie between it and the model, as clients see them."""

from __future__ import annotations

import http.client
import json
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import MODEL, TIMEOUT, generate, generate_grpc, grpc_stream

GREEDY = '{"temperature": 0, "max_tokens": 6, "ignore_eos": true}'
HELLO = {"text_input": "Hello", "stream": True, "sampling_parameters": GREEDY}


@pytest.mark.parametrize(("name", "expected"), [("stream", "BOOL"), ("text_input", "BYTES")])
def test_wrong_data_types_are_tritons_to_refuse(server: TritonServer, name: str, expected: str) -> None:
    error = generate_grpc(server.grpc_url, HELLO | {name: 1}).error
    assert f"input '{name}' data-type is 'INT32', but model '{MODEL}' expects '{expected}'" in str(error)


def test_a_client_that_wants_no_empty_response_gets_the_same(server: TritonServer) -> None:
    """As many responses, the last one final: there is no empty one to be left out."""
    found: list[tuple[bytes, bool]] = []

    def collect(result: Any, error: InferenceServerException | None) -> None:
        assert error is None
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        found.append((result.as_numpy("text_output")[0], final))

    inputs = []
    for name, value, data_type in (
        ("text_input", b"Hello", "BYTES"),
        ("stream", True, "BOOL"),
        ("sampling_parameters", GREEDY.encode(), "BYTES"),
    ):
        tensor = grpcclient.InferInput(name, [1], data_type)
        tensor.set_data_from_numpy(np.array([value], dtype=np.object_ if data_type == "BYTES" else bool))
        inputs.append(tensor)
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(collect)
        client.async_stream_infer(MODEL, inputs)
        client.stop_stream()  # waits for what is open
    assert [final for _, final in found] == [False] * 5 + [True]
    expected = generate_grpc(server.grpc_url, HELLO).texts
    assert [text.decode() for text, _ in found] == expected


def test_an_error_leaves_the_other_requests_of_its_stream_alone(server: TritonServer) -> None:
    expected = generate_grpc(server.grpc_url, HELLO).text
    with grpc_stream(server.grpc_url) as stream:
        stream.send(HELLO, request_id="before")
        stream.send(HELLO | {"sampling_parameters": '{"top_p": 2}'}, request_id="wrong")
        stream.send(HELLO, request_id="after")
        texts = {"before": "", "after": ""}
        errors: list[str] = []
        finals = 0
        while finals < 2 or not errors:
            try:
                request_id, text, final = stream.next()
            except InferenceServerException as error:
                errors.append(error.message())
            else:
                texts[request_id] += "".join(text)
                finals += final
    assert texts == {"before": expected, "after": expected}
    (message,) = errors
    assert "Error generating stream: top_p must be a number in (0, 1], got 2" in message


@pytest.mark.parametrize("way", ["generate", "generate_stream"])
def test_the_id_of_a_request_comes_back_over_http(server: TritonServer, way: str) -> None:
    connection = http.client.HTTPConnection(server.http_url, timeout=TIMEOUT)
    body = {"id": "42", "text_input": "Hello", "sampling_parameters": GREEDY, "stream": way == "generate_stream"}
    connection.request("POST", f"/v2/models/{MODEL}/{way}", json.dumps(body))
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    answers = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert len(answers) == (6 if body["stream"] else 1)
    assert {(answer["id"], answer["model_name"], answer["model_version"]) for answer in answers} == {("42", MODEL, "1")}


def test_an_error_after_the_first_response_is_an_event(server: TritonServer) -> None:
    """The HTTP status has been sent by then."""
    sampling = '{"max_tokens": 900, "ignore_eos": true}'
    body = {"text_input": "Hello", "stream": True, "sampling_parameters": sampling, "timeout": 500_000}
    answer = generate(server.http_url, body, stream=True)
    assert answer.code is None and answer.texts
    assert answer.error is not None and "deadline of 500 ms exceeded" in answer.error
