"""Clients that overwhelm, that do not read, and a process that stands still."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pagedcore.serve.triton_server import TritonServer
from tests.faults.conftest import Measure
from tests.soak.client import Clients, Outcome
from tests.soak.repository import write_repository
from tests.soak.run import leftovers
from tests.soak.traffic import Ends, SoakRequest, Way
from tests.soak.watch import idle_sample
from tests.triton.clients import generate_grpc, grpc_stream

FLOOD = 10_000
STOPPED_SECONDS = 2.0
SLOW_SECONDS = 0.2  # for a token; the model takes a fraction of it


def greedy(max_tokens: int, prompt: str = "Once upon a time") -> dict[str, Any]:
    sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    return {"text_input": prompt, "stream": True, "sampling_parameters": json.dumps(sampling)}


def test_a_stopped_process_goes_on_where_it_was(faulty: TritonServer) -> None:
    inputs = greedy(60)
    alone = generate_grpc(faulty.grpc_url, inputs).text
    (model,) = faulty.stub_processes()
    with grpc_stream(faulty.grpc_url) as stream:
        stream.send(inputs)
        texts = stream.next()[1]
        os.kill(model, signal.SIGSTOP)
        try:
            time.sleep(STOPPED_SECONDS)
        finally:
            os.kill(model, signal.SIGCONT)
        final = False
        while not final:
            _, more, final = stream.next()
            texts += more
    assert "".join(texts) == alone


def test_a_client_that_does_not_read_holds_nobody_up(faulty: TritonServer) -> None:
    inputs = greedy(40)
    alone = generate_grpc(faulty.grpc_url, inputs).text
    replies = asyncio.run(_slow_and_fast(faulty, inputs))
    assert all(reply.outcome is Outcome.ANSWERED and reply.text == alone for reply in replies)
    slow, *fast = replies
    assert all(reply.last < slow.last for reply in fast)


async def _slow_and_fast(server: TritonServer, inputs: dict[str, Any]) -> list[Any]:
    """One that waits before it reads on, each time, and three that read."""
    clients = Clients(server)
    pauses = (SLOW_SECONDS, 0.0, 0.0, 0.0)
    requests = [SoakRequest(Ends.WHOLE, Way.GRPC, inputs, pause=pause) for pause in pauses]
    replies = await asyncio.gather(*(clients.send(request) for request in requests))
    await clients.close()
    return list(replies)


@pytest.mark.slow
def test_ten_thousand_requests_at_once(tmp_path: Path, measure: Measure) -> None:
    repository = write_repository(tmp_path, max_queue_size=0)
    with TritonServer(repository, log_path=tmp_path / "log", exit_timeout=2) as server:
        asyncio.run(_flood(server, 100))
        before = idle_sample(server)
        seconds = asyncio.run(_flood(server, FLOOD))
        found = [line for line in leftovers(before, idle_sample(server, before)) if not line.startswith("region_mib")]
        assert found == []
    measure(seconds, 300.0)


async def _flood(server: TritonServer, count: int) -> float:
    """Seconds until so many requests, all sent at once, have been answered."""
    clients = Clients(server)
    begin = time.monotonic()
    request = SoakRequest(Ends.WHOLE, Way.GRPC, greedy(4))
    replies = await asyncio.gather(*(clients.send(request) for _ in range(count)))
    await clients.close()
    assert {reply.outcome for reply in replies} == {Outcome.ANSWERED}
    return time.monotonic() - begin
