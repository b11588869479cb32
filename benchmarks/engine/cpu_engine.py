"""Prefill and decode speed on the CPU, side by side with transformers and llama.cpp in one run.

Usage: python benchmarks/engine/cpu_engine.py [--repeats 5] [--dtype bfloat16]

"floor" is what the processor could do: the multiplications of linear layers, head and causal attention at the rate of
dot-product instructions on registers, or reading weights and KV cache once a step at the rate of a plain loop that only
reads, whichever takes longer; both rates are measured in the same run. Only where the processor has these instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.kernels.cpu_linear import Ceiling, build_ceiling_program, measure_ceiling
from benchmarks.peers.llama_cpp_setup import ensure_llama_cpp
from benchmarks.peers.worker import Case, Times
from pagedcore import ops
from pagedcore.models.config import ModelConfig
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


@dataclass(frozen=True)
class Work:
    """What a model of the Llama family has to compute and read, in 16 bits."""

    shape: ModelConfig

    @property
    def layer_weights(self) -> int:
        shape = self.shape
        attention = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        return shape.num_layers * shape.hidden_size * (attention + 3 * shape.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.shape.vocab_size * self.shape.hidden_size

    def prefill_floor(self, case: Case, ceiling: Ceiling) -> float:
        """Seconds for the prompts of a case."""
        shape = self.shape
        attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * case.context**2
        operations = 2 * self.layer_weights * case.context + 2 * self.head_weights + attention
        return case.batch * operations / ceiling.multiply

    def decode_floor(self, case: Case, ceiling: Ceiling) -> float:
        """Seconds for the tokens of a case after its prompts."""
        shape, weights = self.shape, self.layer_weights + self.head_weights
        kv_bytes = 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim * case.batch * case.context
        step = max((2 * weights + kv_bytes) / ceiling.read, 2 * weights * case.batch / ceiling.multiply)
        return case.tokens * step


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
    work = Work(ModelConfig.from_folder(Path(model)))
    with tempfile.TemporaryDirectory() as folder:
        has_floor = options.dtype == "bfloat16" and ops.instruction_set() == "avx512_bf16"
        program = build_ceiling_program(Path(folder)) if has_floor else None
        rows = measure(workers, options.repeats, work, program)
    for worker in workers.values():
        worker.close()
    notes = (
        f"SmolLM2-135M, {options.dtype} (llama.cpp: BF16), {threads} threads each, medians of {options.repeats} runs"
    )
    report.write("cpu_engine" if options.dtype == "bfloat16" else f"cpu_engine_{options.dtype}", rows, notes)


def measure(workers: dict[str, Worker], repeats: int, work: Work, ceiling_program: Path | None) -> list[report.Row]:
    """All cases on all workers, and the floor where there is a program that measures it."""
    rows: list[report.Row] = []
    for case in CASES:
        for worker in workers.values():
            worker.run(Case(case.batch, case.context, 2))  # warm up
        times: dict[str, list[Times]] = {name: [] for name in workers}
        for _ in range(repeats):  # alternating, so that a slow minute of the machine hits all alike
            for name, worker in workers.items():
                times[name].append(worker.run(case))
        if ceiling_program is not None:
            ceiling = measure_ceiling(ceiling_program)
            times["floor"] = [Times(work.prefill_floor(case, ceiling), work.decode_floor(case, ceiling))]
        rows += compare(case, times)
    return rows


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
