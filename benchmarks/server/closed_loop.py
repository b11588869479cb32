"""Clients that send their next request when the one before has ended: inside the process, and perf_analyzer's."""

from __future__ import annotations

import json
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pagedcore.engine.engine_thread import EngineThread
from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Load:
    """What a run of a closed loop came to."""

    tokens_per_second: float
    first_token_ms: float  # median
    tokens_per_response: float  # median over requests of their mean


class _Stream:
    """A client inside the process. Counts the tokens it gets."""

    def __init__(self, engine: EngineThread, prompt: list[int], lengths: Sequence[int], name: str) -> None:
        """`lengths`: the output tokens of its requests, last one first."""
        self._engine, self._prompt, self._name = engine, prompt, name
        self._left = list(lengths)
        self._sent = 0.0
        self._waits = True
        self.num_tokens = 0
        self.first: list[float] = []
        self.ended = threading.Event()

    def start(self) -> None:
        if not self._left:
            self.ended.set()
            return
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=self._left.pop())
        self._sent = time.perf_counter()
        self._waits = True
        self._engine.submit(Request(f"{self._name}-{len(self._left)}", self._prompt, params), self)

    def push(self, output: TokenOutput) -> None:
        if self._waits:
            self.first.append(time.perf_counter() - self._sent)
            self._waits = False
        self.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self.start()


def engine_load(engine: EngineThread, prompt: list[int], streams: int, rounds: int, lengths: Sequence[int]) -> Load:
    """The engine thread alone, without a server: `rounds` requests from each of `streams` clients, of these output tokens
    in turn."""
    name = f"load-{time.monotonic_ns()}"
    of_requests = [lengths[i % len(lengths)] for i in range(streams * rounds)]
    clients = [_Stream(engine, prompt, of_requests[i::streams], f"{name}-{i}") for i in range(streams)]
    begin = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.ended.wait()
    seconds = time.perf_counter() - begin
    first = statistics.median(wait for client in clients for wait in client.first)
    return Load(sum(client.num_tokens for client in clients) / seconds, first * 1e3, 1.0)


def server_load(
    perf_analyzer: Path,
    url: str,
    model: str,
    prompt: str,
    streams: int,
    rounds: int,
    lengths: Sequence[int],
    folder: Path,
) -> Load:
    """The same through a server, over gRPC streams. Raises RuntimeError with perf_analyzer's output."""
    entries = []
    for length in lengths:
        parameters = json.dumps({"temperature": 0, "ignore_eos": True, "max_tokens": length})
        entries.append({"text_input": [prompt], "stream": [True], "sampling_parameters": [parameters]})
    (folder / "input.json").write_text(json.dumps({"data": entries}), encoding="utf-8")
    export = folder / f"export-{time.monotonic_ns()}.json"
    command = [
        str(perf_analyzer),
        *f"-m {model} -u {url} -i grpc --async --streaming --stability-percentage 999".split(),
    ]
    command += ["--input-data", str(folder / "input.json"), "--profile-export-file", str(export)]
    command += (
        f"--concurrency-range {streams} --request-count {streams * rounds} --warmup-request-count {streams}".split()
    )
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"perf_analyzer failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    requests = json.loads(export.read_text(encoding="utf-8"))["experiments"][0]["requests"]
    if len(requests) < streams * rounds or not all(request["response_timestamps"] for request in requests):
        raise RuntimeError(f"{len(requests)} of {streams * rounds} requests were answered")
    tokens = [json.loads(request["request_inputs"]["sampling_parameters"])["max_tokens"] for request in requests]
    seconds = (max(r["response_timestamps"][-1] for r in requests) - min(r["timestamp"] for r in requests)) / 1e9
    first = statistics.median(r["response_timestamps"][0] - r["timestamp"] for r in requests) / 1e6
    merged = statistics.median(n / len(r["response_timestamps"]) for n, r in zip(tokens, requests, strict=True))
    return Load(sum(tokens) / seconds, first, merged)
