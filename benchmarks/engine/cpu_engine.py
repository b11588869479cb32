"""Prefill and decode speed on the CPU, side by side with transformers and llama.cpp in one run.

Usage: python benchmarks/engine/cpu_engine.py [--repeats 5] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.peers.llama_cpp_setup import ensure_llama_cpp
from benchmarks.peers.worker import Case, Times
from pagedcore.serve.default_model import ensure_default_model

PEERS = Path(__file__).resolve().parents[1] / "peers"
CASES = [Case(batch, context, 32) for context in (128, 512) for batch in (1, 8, 32)]


class Worker:
    """A measured engine in a process of its own; idle between cases."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._receive()

    def run(self, case: Case) -> Times:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(case)) + "\n")
        self._process.stdin.flush()
        return Times(**self._receive())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _receive(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with status {self._process.wait()}")
        message: dict[str, float] = json.loads(line)
        return message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    model, threads = str(ensure_default_model()), str(len(os.sched_getaffinity(0)))
    llama_python, gguf = ensure_llama_cpp()
    workers = {
        "pagedcore": Worker([sys.executable, str(PEERS / "pagedcore_worker.py"), model, options.dtype, threads]),
        "transformers": Worker([sys.executable, str(PEERS / "transformers_worker.py"), model, options.dtype, threads]),
        "llama.cpp": Worker([str(llama_python), str(PEERS / "llama_cpp_worker.py"), str(gguf), threads]),
    }
    rows: list[report.Row] = []
    for case in CASES:
        for worker in workers.values():
            worker.run(Case(case.batch, case.context, 2))  # warm up
        times: dict[str, list[Times]] = {name: [] for name in workers}
        for _ in range(options.repeats):  # alternating, so that a slow minute of the machine hits all alike
            for name, worker in workers.items():
                times[name].append(worker.run(case))
        rows += compare(case, times)
    for worker in workers.values():
        worker.close()
    notes = (
        f"SmolLM2-135M, {options.dtype} (llama.cpp: BF16), {threads} threads each, medians of {options.repeats} runs"
    )
    report.write("cpu_engine" if options.dtype == "bfloat16" else f"cpu_engine_{options.dtype}", rows, notes)


def compare(case: Case, times: dict[str, list[Times]]) -> list[report.Row]:
    """Our prefill and decode rates of one case beside each peer's."""
    prefill = {name: statistics.median(t.prefill for t in runs) for name, runs in times.items()}
    decode = {name: statistics.median(t.decode for t in runs) for name, runs in times.items()}
    rows = []
    for kind, seconds, tokens in (
        ("prefill", prefill, case.batch * case.context),
        ("decode", decode, case.batch * case.tokens),
    ):
        rate = {name: tokens / value for name, value in seconds.items()}
        rows += [
            report.row(
                f"{kind}, batch {case.batch}, context {case.context}",
                rate["pagedcore"],
                "tok/s",
                peer,
                rate[peer],
                higher_is_better=True,
            )
            for peer in rate
            if peer != "pagedcore"
        ]
    return rows


if __name__ == "__main__":
    main()
