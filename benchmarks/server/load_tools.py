"""The load tools that LLM servers are measured with, each as its documentation says, against the real server.

perf_analyzer with concurrency, with a request rate and with a growing concurrency; genai-perf with `--backend vllm`; aiperf with
its template endpoint. What each has counted is compared with what was asked for, with the server's own counters, and with
perf_analyzer under the same load. The tools come from pip into environments of their own.

Usage: python benchmarks/server/load_tools.py
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.peers.environments import ensure_environment
from benchmarks.peers.perf_analyzer_setup import perf_analyzer_environment, profile
from benchmarks.server.cpu_server import write_repository
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.serve.triton_server import TritonServer

REQUESTS, CONCURRENCY, INPUT_TOKENS, OUTPUT_TOKENS = 48, 4, 64, 32
PERIODIC = (4, 16, 4)  # concurrency at first, requests in all, requests more each time
COUNTERS_SETTLE_SECONDS = 1  # they are brought up to date ten times a second
TEMPLATE = """{"text_input": {{ text|tojson }}, "stream": true,
 "sampling_parameters": {{ ('{"ignore_eos": true, "max_tokens": ' ~ max_tokens ~ '}')|tojson }}}"""


@dataclass(frozen=True)
class Outcome:
    """What a tool has counted; the last three where it says so, under the load of CONCURRENCY clients."""

    requests: int
    output_tokens: float  # of a request, on average
    tokens_per_second: float | None = None
    first_token_ms: float | None = None  # median


@dataclass(frozen=True)
class Target:
    """The server, and a folder for the tools' files."""

    server: TritonServer
    folder: Path

    def counters(self) -> tuple[float, float]:
        """Completed requests and drawn tokens so far, as the server counts them; nothing may be running."""
        time.sleep(COUNTERS_SETTLE_SECONDS)
        with urllib.request.urlopen(self.server.metrics_url, timeout=10) as answer:
            text = answer.read().decode()

        def total(line: str) -> float:
            return sum(float(value) for value in re.findall(rf"^{line}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE))

        return total("vllm:request_success_total"), total("vllm:generation_tokens_total")


def perf_analyzer(target: Target, name: str, load: str, with_parameters: bool = False) -> Outcome:
    """`load`: the options that say how much; `with_parameters`: the sampling parameters are the request's, not a tensor."""
    entry: dict[str, Any] = {"text_input": ["The river " * (INPUT_TOKENS // 2)], "stream": [True]}
    parameters = f"--request-parameter max_tokens:{OUTPUT_TOKENS}:int --request-parameter ignore_eos:true:bool"
    if not with_parameters:
        sampling = {"max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        entry["sampling_parameters"] = [json.dumps(sampling)]
    (target.folder / "input.json").write_text(json.dumps({"data": [entry]}), encoding="utf-8")
    export = target.folder / f"{name}.json"
    requests = profile(
        f"-m llm -u {target.server.grpc_url} -i grpc --async --streaming --input-data {target.folder / 'input.json'} "
        f"--stability-percentage 999 {load} {parameters if with_parameters else ''}".split(),
        export,
    )
    seconds = (max(r["response_timestamps"][-1] for r in requests) - min(r["timestamp"] for r in requests)) / 1e9
    first = statistics.median(r["response_timestamps"][0] - r["timestamp"] for r in requests) / 1e6
    return Outcome(len(requests), OUTPUT_TOKENS, len(requests) * OUTPUT_TOKENS / seconds, first)


def run_tool(command: list[str], environment: dict[str, str], folder: Path) -> None:
    """Run a tool in a folder; raises RuntimeError with what it prints if it fails."""
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")


def profiled(path: Path) -> Outcome:
    """What genai-perf and aiperf export."""
    figures = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(
        int(figures["request_count"]["avg"]),
        figures["output_sequence_length"]["avg"],
        figures["output_token_throughput"]["avg"],
        figures["time_to_first_token"]["p50"],
    )


def genai_perf(target: Target) -> Outcome:
    """It sends vLLM's inputs, numbers as texts, and counts tokens by tokenizing the texts it gets."""
    environment = ensure_environment("genai-perf", ["genai-perf==0.0.16"], "genai-perf")
    command = (
        f"{environment / 'bin' / 'genai-perf'} profile -m llm --backend vllm --endpoint-type kserve --streaming "
        f"-u {target.server.grpc_url} --tokenizer {ensure_default_model()} "
        f"--synthetic-input-tokens-mean {INPUT_TOKENS} --synthetic-input-tokens-stddev 0 "
        f"--output-tokens-mean {OUTPUT_TOKENS} --output-tokens-stddev 0 --output-tokens-mean-deterministic "
        f"--concurrency {CONCURRENCY} --request-count {REQUESTS} --artifact-dir genai-perf"
    ).split()
    run_tool(command, {**perf_analyzer_environment(), "HF_HUB_OFFLINE": "1"}, target.folder)
    (path,) = target.folder.glob("genai-perf/**/*_genai_perf.json")
    return profiled(path)


def aiperf(target: Target) -> Outcome:
    """It posts to generate_stream what a template makes of its prompts."""
    environment = ensure_environment("aiperf", ["aiperf==0.13.0"], "aiperf")
    (target.folder / "template.json").write_text(TEMPLATE, encoding="utf-8")
    command = (
        f"{environment / 'bin' / 'aiperf'} profile -m llm --endpoint-type template --streaming "
        f"--custom-endpoint /v2/models/llm/generate_stream -u http://{target.server.http_url} "
        f"--tokenizer {ensure_default_model()} --extra-inputs payload_template:{target.folder / 'template.json'} "
        f"--extra-inputs response_field:text_output --isl {INPUT_TOKENS} --osl {OUTPUT_TOKENS} "
        f"--concurrency {CONCURRENCY} --request-count {REQUESTS} --ui none "
        f"--output-artifact-dir {target.folder / 'aiperf'}"
    ).split()
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    run_tool(command, inherited, target.folder)
    (path,) = target.folder.glob("aiperf/**/profile_export_aiperf.json")
    return profiled(path)


def compared(
    name: str, target: Target, tool: Callable[[], Outcome], peer: Outcome | None
) -> tuple[Outcome, list[report.Row]]:
    """Run a tool; its figures beside the server's and, under the same load, `peer`'s (perf_analyzer's)."""
    requests_before, tokens_before = target.counters()
    outcome = tool()
    requests, tokens = target.counters()
    served, drawn = requests - requests_before, tokens - tokens_before

    def row(
        what: str, value: float, unit: str, other: str, other_value: float, higher_is_better: bool = True
    ) -> report.Row:
        return report.row(f"{name}: {what}", value, unit, other, other_value, higher_is_better=higher_is_better)

    rows = [
        row("requests", outcome.requests, "requests", "server's counter", served),
        row("tokens of a request by the tool", outcome.output_tokens, "tokens", "asked for", OUTPUT_TOKENS),
        row("tokens of a request by the server", drawn / served, "tokens", "asked for", OUTPUT_TOKENS),
    ]
    if peer is not None:
        assert outcome.tokens_per_second is not None and peer.tokens_per_second is not None
        assert outcome.first_token_ms is not None and peer.first_token_ms is not None
        rate, first = peer.tokens_per_second, peer.first_token_ms
        rows.append(row("output", outcome.tokens_per_second, "tok/s", "perf_analyzer", rate))
        rows.append(row("time to first token", outcome.first_token_ms, "ms", "perf_analyzer", first, False))
    return outcome, rows


def main() -> None:
    rows: list[report.Row] = []
    start, end, step = PERIODIC
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with TritonServer(write_repository(folder, len(os.sched_getaffinity(0))), log_path=folder / "log") as server:
            target = Target(server, folder)
            constant, more = compared(
                f"perf_analyzer, concurrency {CONCURRENCY}",
                target,
                lambda: perf_analyzer(
                    target, "concurrency", f"--concurrency-range {CONCURRENCY} --request-count {REQUESTS}"
                ),
                None,
            )
            rows += more
            rate = "--request-rate-range 4 --request-distribution poisson --request-count"
            growing = f"--periodic-concurrency-range {start}:{end}:{step} --request-period {OUTPUT_TOKENS // 2}"
            for label, tool, peer in (
                ("perf_analyzer, 4 requests/s", lambda: perf_analyzer(target, "rate", f"{rate} {REQUESTS}"), None),
                ("perf_analyzer, periodic", lambda: perf_analyzer(target, "periodic", growing, True), None),
                ("genai-perf", lambda: genai_perf(target), constant),
                ("aiperf", lambda: aiperf(target), constant),
            ):
                rows += compared(label, target, tool, peer)[1]
    notes = f"SmolLM2-135M, about {INPUT_TOKENS} tokens in, {OUTPUT_TOKENS} out, {CONCURRENCY} clients where not said otherwise"
    report.write("load_tools", rows, notes)


if __name__ == "__main__":
    main()
