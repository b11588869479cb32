"""Output tokens per second through tritonserver, with perf_analyzer as the client, beside the engine's own in the same run.

Usage: python benchmarks/server/cpu_server.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.peers.perf_analyzer_setup import profile
from pagedcore.build import LoadedEngine, build_engine
from pagedcore.config import EngineConfig
from pagedcore.engine.engine_thread import EngineThread
from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.serve.triton_server import TritonServer
from pagedcore.text import load_tokenizer

STREAMS = (1, 8, 32)
PROMPT_TOKENS, OUTPUT_TOKENS, ROUNDS = 128, 64, 3
ENGINE = {"dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 64, "enable_prefix_caching": False}


def make_prompts(count: int) -> list[str]:
    """Texts of about PROMPT_TOKENS tokens: random words of the vocabulary, all different."""
    tokenizer = load_tokenizer(ensure_default_model())
    rng = random.Random(count)
    return [tokenizer.decode([rng.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS - 20)]) for _ in range(count)]


class Stream:
    """A closed-loop client inside the process: the next request starts when the one before has ended."""

    def __init__(self, engine: EngineThread, prompts: list[list[int]], name: str) -> None:
        self._engine, self._prompts, self._name = engine, prompts, name
        self._next = 0
        self.ended = threading.Event()

    def start(self) -> None:
        if self._next == len(self._prompts):
            self.ended.set()
            return
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=OUTPUT_TOKENS)
        request = Request(f"{self._name}-{self._next}", self._prompts[self._next], params)
        self._next += 1
        self._engine.submit(request, self)

    def push(self, output: TokenOutput) -> None:
        if output.finish_reason is not None:
            self.start()


def engine_rate(loaded: LoadedEngine[EngineThread], prompts: list[str], streams: int, label: str) -> float:
    """Output tokens per second of the engine thread without a server."""
    assert loaded.tokenizer is not None
    ids = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    clients = [Stream(loaded.engine, ids[i::streams], f"{label}-{i}") for i in range(streams)]
    begin = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.ended.wait()
    return len(prompts) * OUTPUT_TOKENS / (time.perf_counter() - begin)


def server_rate(server: TritonServer, prompts: list[str], streams: int, folder: Path) -> tuple[float, float]:
    """Output tokens per second through the server, and the median seconds to the first token."""
    parameters = json.dumps({"temperature": 0, "ignore_eos": True, "max_tokens": OUTPUT_TOKENS})
    entries = [{"text_input": [p], "stream": [True], "sampling_parameters": [parameters]} for p in prompts]
    (folder / "input.json").write_text(json.dumps({"data": entries}), encoding="utf-8")
    export = folder / f"export-{time.monotonic_ns()}.json"
    requests = profile(
        f"-m llm -u {server.grpc_url} -i grpc --async --streaming --input-data {folder / 'input.json'} "
        f"--concurrency-range {streams} --request-count {len(prompts)} --stability-percentage 999".split(),
        export,
    )
    begin = min(request["timestamp"] for request in requests)
    end = max(request["response_timestamps"][-1] for request in requests)
    first = statistics.median(request["response_timestamps"][0] - request["timestamp"] for request in requests)
    return len(requests) * OUTPUT_TOKENS / ((end - begin) / 1e9), first / 1e9


def write_repository(folder: Path, threads: int) -> Path:
    """The shipped model with this benchmark's engine arguments."""
    model = folder / "repository" / "llm"
    (model / "1").mkdir(parents=True)
    shipped = report.ROOT / "model_repository" / "llm"
    (model / "config.pbtxt").write_bytes((shipped / "config.pbtxt").read_bytes())
    (model / "1" / "model.py").write_bytes((shipped / "1" / "model.py").read_bytes())
    arguments = {"model": str(ensure_default_model()), "num_threads": threads, **ENGINE}
    (model / "1" / "model.json").write_text(json.dumps(arguments), encoding="utf-8")
    return model.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    loaded = build_engine(
        EngineConfig.from_dict({"model": str(ensure_default_model()), "num_threads": threads, **ENGINE})
    )
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with TritonServer(write_repository(folder, threads)) as server:
            for streams in STREAMS:
                prompts = make_prompts(ROUNDS * max(streams, 4))
                engine, served, first = [], [], []
                for repeat in range(options.repeats + 1):
                    own = engine_rate(loaded, prompts, streams, f"{streams}-{repeat}")
                    rate, ttft = server_rate(server, prompts, streams, folder)
                    if repeat > 0:  # the first round warms both up
                        engine.append(own)
                        served.append(rate)
                        first.append(ttft)
                rows.append(
                    report.row(
                        f"{streams} streams, output",
                        statistics.median(served),
                        "tok/s",
                        "own engine, no server",
                        statistics.median(engine),
                        higher_is_better=True,
                    )
                )
                print(
                    f"{streams} streams: median time to first token {statistics.median(first) * 1e3:.1f} ms", flush=True
                )
    loaded.shutdown()
    notes = (
        f"SmolLM2-135M bfloat16, {PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out, greedy, closed loop, medians of "
        f"{options.repeats} alternating runs; server, stub and perf_analyzer share the machine's {threads} cores"
    )
    report.write("cpu_server", rows, notes)


if __name__ == "__main__":
    main()
