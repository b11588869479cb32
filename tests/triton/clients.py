"""Small clients for the tests: HTTP by the standard library, gRPC by tritonclient."""

from __future__ import annotations

import http.client
import json
import queue
import re
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from pagedcore.serve.triton_server import TritonServer

MODEL = "llm"
TIMEOUT = 60.0  # seconds, after which a test gives up
_NUMPY = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32}


@dataclass(frozen=True)
class Answer:
    """What a client got: the texts of the responses in order, and the error (over HTTP with `code`, Triton's name for it)."""

    texts: list[str]
    error: str | None = None
    code: str | None = None
    finals: tuple[bool, ...] = ()
    num_responses: int = 0

    @property
    def text(self) -> str:
        return "".join(self.texts)


def generate(url: str, body: Mapping[str, Any] | bytes, *, stream: bool = False) -> Answer:
    """POST to generate or generate_stream."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(url, timeout=TIMEOUT)
    try:
        connection.request("POST", f"/v2/models/{MODEL}/generate{'_stream' if stream else ''}", data)
        response = connection.getresponse()
        content = response.read().decode()
        code = {200: None, 400: "INVALID_ARG", 404: "NOT_FOUND", 500: "INTERNAL", 503: "UNAVAILABLE"}[response.status]
    finally:
        connection.close()
    events = [json.loads(line.removeprefix("data: ")) for line in content.splitlines() if line]
    errors = [event["error"] for event in events if "error" in event]
    return Answer(
        [event["text_output"] for event in events if "text_output" in event],
        "".join(errors) or None,
        code,
        (),
        len(events),
    )


@dataclass(frozen=True)
class Response:
    """One response of a gRPC stream: its outputs by name, as Python lists (texts decoded), and their types and shapes."""

    request_id: str
    final: bool
    values: dict[str, list[Any]]
    types: dict[str, tuple[str, list[int]]]


class GrpcStream:
    """One gRPC stream; its requests' responses arrive in one queue, told apart by their ids."""

    def __init__(self, url: str, model: str = MODEL, *, ends_with_code: bool = False) -> None:
        """`ends_with_code`: an error ends the stream, with its code, instead of being told without one."""
        self._model = model
        self._client = grpcclient.InferenceServerClient(url)
        self._responses: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
        headers = {"triton_grpc_error": "true"} if ends_with_code else None
        self._client.start_stream(lambda result, error: self._responses.put((result, error)), headers=headers)

    def send(
        self,
        inputs: Mapping[str, Any],
        *,
        request_id: str = "",
        parameters: dict[str, Any] | None = None,
        outputs: Sequence[str] = (),
        timeout: int | None = None,
    ) -> None:
        """`inputs` by name, as Python values; a list makes a tensor of its length. No `outputs` means all of them.

        `timeout`: Triton's, of the request, in microseconds.
        """
        self._client.async_stream_infer(
            self._model,
            [_tensor(name, value) for name, value in inputs.items()],
            outputs=[grpcclient.InferRequestedOutput(name) for name in outputs] or None,
            request_id=request_id,
            parameters=parameters,
            timeout=timeout,
            enable_empty_final_response=True,
        )

    def next(self) -> tuple[str, list[str], bool]:
        """The next response: request id, texts, final; raises InferenceServerException for an error response."""
        response = self.next_response()
        return response.request_id, response.values.get("text_output", []), response.final

    def next_response(self) -> Response:
        """The next response; raises InferenceServerException for an error response."""
        result, error = self._responses.get(timeout=TIMEOUT)
        if error is not None:
            raise error
        response = result.get_response()
        values = {output.name: result.as_numpy(output.name).tolist() for output in response.outputs}
        return Response(
            response.id,
            response.parameters["triton_final_response"].bool_param,
            {name: [v.decode() if isinstance(v, bytes) else v for v in value] for name, value in values.items()},
            {output.name: (output.datatype, list(output.shape)) for output in response.outputs},
        )

    def arrived(self) -> list[str]:
        """The texts of the responses that have arrived and have not been asked for; errors are left out."""
        texts: list[str] = []
        while not self._responses.empty():
            result, error = self._responses.get()
            if error is None:
                texts += [text.decode() for text in result.as_numpy("text_output")]
        return texts

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def close(self) -> None:
        self._client.close()


@contextmanager
def grpc_stream(url: str, model: str = MODEL, *, ends_with_code: bool = False) -> Iterator[GrpcStream]:
    stream = GrpcStream(url, model, ends_with_code=ends_with_code)
    try:
        yield stream
    finally:
        stream.close()


def generate_grpc(url: str, inputs: Mapping[str, Any], *, parameters: dict[str, Any] | None = None) -> Answer:
    """One request on a gRPC stream of its own. Errors come without their code there."""
    texts: list[str] = []
    finals: list[bool] = []
    with grpc_stream(url) as stream:
        stream.send(inputs, parameters=parameters)
        try:
            while not (finals and finals[-1]):
                _, text, final = stream.next()
                texts += text
                finals.append(final)
        except InferenceServerException as error:
            return Answer(texts, error.message(), finals=tuple(finals))
    return Answer(texts, finals=tuple(finals))


def infer_request(inputs: Mapping[str, Any], **fields: Any) -> service_pb2.ModelInferRequest:
    """The message that asks the model; `fields` are more of its own ones."""
    request = service_pb2.ModelInferRequest(**{"model_name": MODEL} | fields)
    for name, value in inputs.items():
        tensor = _tensor(name, value)
        request.inputs.append(tensor._get_tensor())
        request.raw_input_contents.append(tensor._get_content())
    return request


def stream_infer(
    url: str, requests: Iterable[service_pb2.ModelInferRequest], *, timeout: float
) -> list[service_pb2.ModelStreamInferResponse]:
    """All that a gRPC stream answers to these requests until it ends, by the protocol's own stub.

    Raises grpc.RpcError where the stream ends with an error of its own, as after `timeout` seconds.
    """
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return list(stub.ModelStreamInfer(iter(requests), timeout=timeout))


def responses_of(url: str, inputs: Mapping[str, Any], *, model: str = MODEL, **send: Any) -> list[Response]:
    """All responses to one request; raises InferenceServerException for an error response."""
    with grpc_stream(url, model) as stream:
        stream.send(inputs, **send)
        responses = [stream.next_response()]
        while not responses[-1].final:
            responses.append(stream.next_response())
    return responses


def _tensor(name: str, value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    data_type = "BYTES" if isinstance(values[0], (str, bytes)) else "BOOL" if isinstance(values[0], bool) else "INT32"
    tensor = grpcclient.InferInput(name, [len(values)], data_type)
    encoded = [item.encode() if isinstance(item, str) else item for item in values]
    tensor.set_data_from_numpy(np.array(encoded, dtype=_NUMPY[data_type]))
    return tensor


def metrics_text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        content: str = response.read().decode()
    return content


def metric(url: str, name: str) -> float:
    """A gauge of the model from the metrics endpoint."""
    found = re.search(rf"^{re.escape(name)}\{{[^}}]*\}} (\S+)$", metrics_text(url), re.MULTILINE)
    assert found is not None, f"no metric {name}"
    return float(found[1])


def wait_until(condition: Callable[[], bool], timeout: float = TIMEOUT) -> float:
    """Seconds until the condition holds; fails after `timeout`."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout, "the condition does not come true"
        time.sleep(0.005)
    return time.monotonic() - begin


def send_until_running(server: TritonServer, stream: GrpcStream, inputs: Mapping[str, Any], count: int) -> None:
    """Send requests one by one, until so many are running: sent at once, they could be more than a short queue takes."""

    def has(number: int) -> bool:
        return metric(server.metrics_url, "vllm:num_requests_running") == number

    for number in range(1, count + 1):
        stream.send(inputs)
        wait_until(partial(has, number))
