"""The default model's linear layers in bfloat16 on the CPU, against the machine's limits and against torch in the same run.

Usage: python benchmarks/kernels/cpu_linear.py [--rounds 25]

Called as the engine calls them, through a captured graph. Weights are rotated, so that none is in a cache when its turn
comes. In each round this library and torch take turns; every figure is the best round's, as the machine's limits are the
best of several measurements. "floor" is the longer of two times: reading the weights at the rate of a plain loop that
only reads, and the multiplications at the rate of a loop of dot-product instructions on registers, both measured before
and after each number of rows (what a virtual machine gets changes with its host's other guests). Rows "beside a
neighbour" repeat a case while another process keeps one core busy; there, the median round counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import report
from pagedcore import ops

# (out_features, in_features, how many of them the model has)
SHAPES = {
    "qkv 960x576": (960, 576, 30),
    "o 576x576": (576, 576, 30),
    "gate_up 3072x576": (3072, 576, 30),
    "down 576x1536": (576, 1536, 30),
    "head 49152x576": (49152, 576, 1),
}
ROWS = (1, 8, 32, 128, 512, 2048)
MAX_HEAD_ROWS = 128  # logits are computed for the last token of a sequence
ROTATED_BYTES = 64 << 20
MAX_OPERATIONS = 5e9  # of one turn
PAUSE = 0.02  # seconds before a turn: the threads of the one before have stopped waiting for more work by then


@dataclass(frozen=True)
class Ceiling:
    """The machine's limits on the threads used: bytes and floating-point operations a second."""

    read: float
    multiply: float

    def best(self, other: Ceiling) -> Ceiling:
        return Ceiling(max(self.read, other.read), max(self.multiply, other.multiply))

    def seconds(self, rows: int, out_features: int, in_features: int) -> float:
        weights = out_features * in_features
        return max(2 * weights / self.read, 2 * rows * weights / self.multiply)


def build_ceiling_program(folder: Path) -> Path:
    program = folder / "cpu_ceiling"
    flags = ["-std=c++20", "-O3", "-mavx512f", "-mavx512bf16", "-pthread"]
    source = Path(__file__).with_name("cpu_ceiling.cc")
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    return program


def measure_ceiling(program: Path) -> Ceiling:
    command = [str(program), str(ops.num_threads())]
    read, multiply = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    return Ceiling(read, multiply)


Summary = Callable[[list[float]], float]


def alternate(rounds: int, summary: Summary, *turns: Callable[[], None]) -> list[float]:
    """The seconds of each turn, summed up over the rounds; each is run once a round, and once before."""
    times: list[list[float]] = [[] for _ in turns]
    for _ in range(rounds + 1):
        for turn, seconds in zip(turns, times, strict=True):
            time.sleep(PAUSE)
            start = time.perf_counter()
            turn()
            seconds.append(time.perf_counter() - start)
    return [summary(seconds[1:]) for seconds in times]


def measure(rows: int, out_features: int, in_features: int, rounds: int, summary: Summary) -> tuple[float, float]:
    """Seconds of one product: this library's and torch's."""
    copies = max(1, ROTATED_BYTES // (2 * out_features * in_features))
    copies = max(1, min(copies, int(MAX_OPERATIONS / (2 * rows * out_features * in_features))))
    weights = [torch.randn(out_features, in_features).bfloat16() for _ in range(copies)]
    arena = ops.WeightArena()
    packed = [ops.pack_linear(weight, arena) for weight in weights]
    x = torch.randn(rows, in_features).bfloat16()
    out = torch.empty(rows, out_features, dtype=torch.bfloat16)

    graph = ops.CpuGraph()
    with graph.capture():
        for weight in packed:
            ops.packed_linear(x, weight, out=out)

    def peer() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    seconds, peer_seconds = alternate(rounds, summary, graph.replay, peer)
    return seconds / copies, peer_seconds / copies


def shape_rows(name: str, rows: int, seconds: float, peer_seconds: float, floor: float) -> list[report.Row]:
    out_features, in_features, _ = SHAPES[name]
    case = f"{name} rows={rows}"
    if 2 * rows * out_features * in_features < 1e8:
        amount, unit = 2e-9 * out_features * in_features, "GB/s"
    else:
        amount, unit = 2e-9 * rows * out_features * in_features, "GFLOP/s"
    return [
        report.row(case, amount / seconds, unit, "floor", amount / floor, higher_is_better=True),
        report.row(case, amount / seconds, unit, "torch bf16", amount / peer_seconds, higher_is_better=True),
    ]


def model_rows(
    rows: int, times: dict[str, tuple[float, float]], ceiling: Ceiling, suffix: str = ""
) -> list[report.Row]:
    """All linear layers of one step over `rows` tokens."""
    ours = sum(times[name][0] * count for name, (_, _, count) in SHAPES.items() if name in times)
    peer = sum(times[name][1] * count for name, (_, _, count) in SHAPES.items() if name in times)
    floor = sum(ceiling.seconds(rows, out, inp) * count for name, (out, inp, count) in SHAPES.items() if name in times)
    case = f"all linear layers{'' if 'head 49152x576' in times else ' but the head'} rows={rows}{suffix}"
    return [
        report.row(case, 1e3 * ours, "ms", "floor", 1e3 * floor, higher_is_better=False),
        report.row(case, 1e3 * ours, "ms", "torch bf16", 1e3 * peer, higher_is_better=False),
    ]


def measure_model(rows: int, rounds: int, summary: Summary) -> dict[str, tuple[float, float]]:
    return {
        name: measure(rows, out_features, in_features, rounds, summary)
        for name, (out_features, in_features, _) in SHAPES.items()
        if not (name.startswith("head") and rows > MAX_HEAD_ROWS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    if ops.instruction_set() != "avx512_bf16":
        raise SystemExit(f"error: measures bfloat16 dot products, and this processor is {ops.instruction_set()}")
    torch.set_num_threads(ops.num_threads())
    figures: list[report.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        program = build_ceiling_program(Path(folder))
        ceilings = [measure_ceiling(program)]
        for rows in ROWS:
            times = measure_model(rows, arguments.rounds, min)
            ceilings.append(measure_ceiling(program))
            ceiling = ceilings[-2].best(ceilings[-1])
            figures += model_rows(rows, times, ceiling)
            for name, (seconds, peer_seconds) in times.items():
                out_features, in_features, _ = SHAPES[name]
                floor = ceiling.seconds(rows, out_features, in_features)
                figures += shape_rows(name, rows, seconds, peer_seconds, floor)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
            for rows in (1, 8):
                times = measure_model(rows, arguments.rounds, statistics.median)
                figures += model_rows(rows, times, ceilings[-1], " beside a neighbour")
            neighbour.kill()
    rates = ", ".join(f"{ceiling.read / 1e9:.0f} GB/s and {ceiling.multiply / 1e9:.0f} GFLOP/s" for ceiling in ceilings)
    report.write("cpu_linear", figures, f"{ops.num_threads()} threads; limits measured between the cases: {rates}")


if __name__ == "__main__":
    main()
