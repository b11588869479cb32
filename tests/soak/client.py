"""Clients by the hundred in one event loop: gRPC streams and HTTP connections that read, are slow, or go away."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from enum import Enum, auto

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pagedcore.serve.triton_server import TritonServer
from tests.soak.traffic import Ends, SoakRequest, Way
from tests.triton.clients import MODEL, infer_request

PATIENCE = 120.0  # seconds; a request that is not answered by then is lost
_FINAL = "triton_final_response"


class Outcome(Enum):
    ANSWERED = auto()
    GONE = auto()  # the client has left
    REFUSED = auto()  # with an error, as bad input must be
    OVERLOADED = auto()  # with UNAVAILABLE, by a full queue
    WRONG = auto()


@dataclass(frozen=True)
class Reply:
    """What came of a request. Times in seconds: of the first response and of the last one; `why`: what is wrong."""

    outcome: Outcome
    first: float = 0.0
    last: float = 0.0
    num_responses: int = 0
    text: str = ""
    why: str = ""


@dataclass
class _Reading:
    """Responses as they arrive."""

    begin: float = field(default_factory=time.monotonic)
    first: float = 0.0
    count: int = 0
    texts: list[str] = field(default_factory=list)
    error: str = ""

    def add(self, text: str) -> None:
        if not self.count:
            self.first = time.monotonic() - self.begin
        self.count += 1
        self.texts.append(text)

    def reply(self, request: SoakRequest, num_final: int) -> Reply:
        last = time.monotonic() - self.begin
        text = "".join(self.texts)
        outcome, why = Outcome.ANSWERED, ""
        if self.error:
            overloaded = "max_queue_size" in self.error
            outcome = Outcome.OVERLOADED if overloaded else Outcome.REFUSED
            if not overloaded and request.ends is not Ends.REFUSED:
                outcome, why = Outcome.WRONG, f"refused: {self.error[:300]}"
        elif request.ends is Ends.REFUSED:
            outcome, why = Outcome.WRONG, f"not refused: {json.dumps(request.inputs)[:300]}"
        if num_final != 1:
            outcome, why = Outcome.WRONG, f"{num_final} final responses: {json.dumps(request.inputs)[:300]}"
        return Reply(outcome, self.first, last, self.count, text, why)


class Clients:
    """The connections to one server."""

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self._channel = grpc.aio.insecure_channel(server.grpc_url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def send(self, request: SoakRequest) -> Reply:
        """One request from beginning to end, however that is; lost ones are WRONG."""
        try:
            sending = self._grpc(request) if request.way is Way.GRPC else self._http(request)
            return await asyncio.wait_for(sending, PATIENCE)
        except asyncio.TimeoutError:
            return Reply(Outcome.WRONG, why=f"no end after {PATIENCE:.0f} s: {json.dumps(request.inputs)[:300]}")

    async def _grpc(self, request: SoakRequest) -> Reply:
        reading, num_final = _Reading(), 0
        message = infer_request(request.inputs)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        call = self._stub.ModelStreamInfer(iter([message]))
        if request.ends is Ends.CANCELLED and request.gone_after == 0:
            await asyncio.sleep(0.002)
            call.cancel()
            return Reply(Outcome.GONE)
        async for response in call:
            if response.error_message:
                reading.error, num_final = response.error_message, num_final + 1
                continue
            answer = response.infer_response
            final = answer.parameters[_FINAL].bool_param
            num_final += final
            if answer.outputs:
                reading.add(_text(answer))
            if request.ends is Ends.CANCELLED and reading.count >= request.gone_after and not final:
                call.cancel()
                return Reply(Outcome.GONE)
            if request.pause:
                await asyncio.sleep(request.pause)
        return reading.reply(request, num_final)

    async def _http(self, request: SoakRequest) -> Reply:
        reading = _Reading()
        body = json.dumps(request.inputs).encode()
        streams = request.way is Way.HTTP_STREAM
        reader, writer = await asyncio.open_connection(self._server.host, self._server.http_port, limit=1 << 22)
        try:
            path = f"/v2/models/{MODEL}/generate{'_stream' if streams else ''}"
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            if request.ends is Ends.CANCELLED and request.gone_after == 0:
                return Reply(Outcome.GONE)
            async for line in reader:
                start = line.find(b"{")
                if start < 0 or not line.rstrip().endswith(b"}"):
                    continue  # the status line, a header, the length of a chunk
                event = json.loads(line[start:])
                if "error" in event:
                    reading.error = event["error"]
                else:
                    reading.add(str(event.get("text_output", "")))
                if request.ends is Ends.CANCELLED and reading.count >= request.gone_after:
                    return Reply(Outcome.GONE)
                if request.pause:
                    await asyncio.sleep(request.pause)
        finally:
            writer.close()
        return reading.reply(request, num_final=1 if reading.count or reading.error else 0)


def _text(answer: service_pb2.ModelInferResponse) -> str:
    """The first output sequence's text."""
    for output, content in zip(answer.outputs, answer.raw_output_contents, strict=True):
        if output.name == "text_output":
            size = int.from_bytes(content[:4], "little")
            text: str = content[4 : 4 + size].decode()
            return text
    return ""
