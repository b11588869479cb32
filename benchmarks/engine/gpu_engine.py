"""The engine on a GPU beside vLLM and the hardware's floor, all in one run: decode steps, first tokens, throughput, start-up.

Usage: python -m benchmarks.engine.gpu_engine [--vllm FOLDER] [--shapes llama8b,qwen06b] [--name h100_engine]

FOLDER: vLLM 0.26 and what it needs, put in front of PYTHONPATH for its processes alone (pip install --target FOLDER); without
it vLLM is taken from this environment. "floor" of a decode step: weights and KV cache read once at the speed of a plain
reduction over 2 GB; of a first token: that, or the products at the speed of a large bfloat16 one, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.kernels.gpu_timing import microseconds, read_limit
from benchmarks.peers.gpu_worker import BATCHES, DECODED, PROMPT_LENGTHS, SHAPES

TITLES = {"llama8b": "Llama-3.1-8B shape", "qwen06b": "Qwen3-0.6B shape"}
CONTEXT = 128 + 16 + DECODED / 2  # of the decode steps, on average


def figures(engine: str, shape: str, vllm: Path | None, *options: str) -> dict[str, float]:
    """What `benchmarks.peers.gpu_worker` prints for an engine with these options, in a process of its own."""
    environment = dict(os.environ)
    if engine == "vllm" and vllm is not None:
        environment["PYTHONPATH"] = f"{vllm}:{report.ROOT}"
    command = [sys.executable, "-m", "benchmarks.peers.gpu_worker", engine, shape, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{engine}, {shape}:\n{result.stderr[-4000:]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


class Floor:
    """What this GPU cannot be faster than, for one model."""

    def __init__(self, shape: dict[str, Any], bytes_per_ms: float, operations_per_ms: float) -> None:
        hidden, layers, head_dim = shape["hidden_size"], shape["num_hidden_layers"], shape["head_dim"]
        heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * shape["intermediate_size"]
        self._body = layers * layer
        self._head = hidden * shape["vocab_size"]
        self._kv_bytes = 2 * 2 * layers * kv_heads * head_dim
        self._bytes_per_ms, self._operations_per_ms = bytes_per_ms, operations_per_ms

    def decode_step(self, batch: int) -> float:
        """Milliseconds to read the weights and the batch's KV cache."""
        return float((2 * (self._body + self._head) + batch * CONTEXT * self._kv_bytes) / self._bytes_per_ms)

    def first_token(self, length: int) -> float:
        """Milliseconds of a prompt's products, without attention's, or of reading the weights."""
        products = 2 * (self._body * length + self._head) / self._operations_per_ms
        return float(max(products, 2 * (self._body + self._head) / self._bytes_per_ms))


def product_limit() -> float:
    """Operations a millisecond of a bfloat16 product of 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / (microseconds([lambda: torch.mm(a, b, out=out)] * 4) / 1e3)


def shape_rows(shape: str, vllm: Path | None, floor: Floor) -> list[report.Row]:
    """Figures of one model: ours beside vLLM's, then beside the floor."""
    theirs = figures("vllm", shape, vllm)
    ours = figures("pagedcore", shape, None)
    rows = []

    def add(name: str, unit: str, higher_is_better: bool = False, least: float | None = None) -> None:
        title = f"{TITLES[shape]}, {name}"
        for peer, value in (("vLLM", theirs[name]), ("floor", least)):
            if value is not None:
                rows.append(report.row(title, ours[name], unit, peer, value, higher_is_better=higher_is_better))

    for batch in BATCHES:
        add(f"decode step, batch {batch}", "ms", least=floor.decode_step(batch))
    for length in PROMPT_LENGTHS:
        add(f"first token of {length}", "ms", least=floor.first_token(length))
    for temperature in (0, 0.6):
        add(f"256 requests, T={temperature:g}", "tok/s", higher_is_better=True)
    add("start-up, s", "s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--shapes", default="llama8b,qwen06b")
    parser.add_argument("--name", default="h100_engine", help="of the result file")
    arguments = parser.parse_args()
    bytes_per_ms, operations_per_ms = read_limit() * 1e3, product_limit()
    torch.cuda.empty_cache()
    rows: list[report.Row] = []
    for shape in arguments.shapes.split(","):
        rows += shape_rows(shape, arguments.vllm, Floor(SHAPES[shape], bytes_per_ms, operations_per_ms))
        notes = (
            f"random weights, bfloat16, a context of about {CONTEXT:.0f} tokens in the decode steps, 256 requests of 100 to "
            "1024 tokens in and out; vLLM 0.26 in one process with its own sampler, prefix caching "
            "off and at most 256 sequences of 4096 tokens as here, otherwise at its defaults; floor: "
            f"{bytes_per_ms / 1e9:.2f} TB/s and {operations_per_ms / 1e9:.0f} TFLOP/s, measured in this run"
        )
        report.write(arguments.name, rows, notes)


if __name__ == "__main__":
    main()
