"""Paged attention in bfloat16 on the CPU, against the machine's limits and against torch in the same run.

Usage: python benchmarks/kernels/cpu_attention.py [--rounds 7]

torch runs scaled_dot_product_attention on keys and values that were gathered into one contiguous tensor beforehand: the
gathering, which it would need in every step, is not counted. To decode, the query heads that share a KV head are given to it
as that head's queries, which is several times faster than its own handling of groups. Calls are replayed from a graph, as
the engine does. Decode cases go round 30 caches, the default model's layers, so that nothing is in a cache of the processor
that would not be there in a step. Every figure is the median of the rounds, in each of which the two take turns. "floor" is
the longer of two times: reading the keys and values at the rate of a plain loop that only reads, and the multiplications at
the rate of a loop of dot-product instructions on registers. Keys and values that the last-level cache holds are read faster
than that.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.kernels.cpu_linear import Ceiling, alternate, build_ceiling_program, measure_ceiling
from pagedcore import _kernels, ops

NUM_LAYERS = 30


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"heads {self.num_heads}/{self.num_kv_heads} x {self.head_dim}"


@dataclass(frozen=True)
class Case:
    """Equal rows: the last query_len of seq_len tokens each."""

    heads: Heads
    num_rows: int
    seq_len: int
    query_len: int = 1
    num_caches: int = 1
    block_size: int = 16

    @property
    def name(self) -> str:
        kind = "decode" if self.query_len == 1 else f"prefill {self.query_len} of"
        return f"{self.heads} rows={self.num_rows} {kind} {self.seq_len}"

    @property
    def bytes(self) -> int:
        """Keys and values, each read once."""
        return 4 * self.num_rows * self.seq_len * self.heads.num_kv_heads * self.heads.head_dim

    @property
    def operations(self) -> float:
        """Multiplications and additions of the pairs of query and key that are not masked."""
        pairs = self.query_len * (self.seq_len - self.query_len) + self.query_len * (self.query_len + 1) / 2
        return 4 * self.num_rows * self.heads.num_heads * self.heads.head_dim * pairs


SMALL = Heads(9, 3, 64)  # the default model's
LARGE = Heads(32, 8, 128)  # Llama 3 8B's
CASES = [
    *(Case(SMALL, rows, seq_len, num_caches=NUM_LAYERS) for rows in (1, 8, 32) for seq_len in (128, 512)),
    Case(SMALL, 1, 8192, num_caches=NUM_LAYERS),
    Case(LARGE, 8, 1024, num_caches=4),
    *(Case(SMALL, 1, length, length) for length in (128, 512, 2048)),
    Case(SMALL, 32, 128, 128),
    Case(SMALL, 1, 2048, 512),
    Case(LARGE, 1, 1024, 1024),
]


def paged_turn(case: Case) -> Callable[[], None]:
    """This library on every cache once, from a graph as the engine runs it."""
    heads = case.heads
    width = -(-case.seq_len // case.block_size)
    num_blocks = case.num_rows * width
    caches = in_huge_pages(case.num_caches, 2, num_blocks, heads.num_kv_heads, case.block_size, heads.head_dim)
    q = torch.randn(case.num_rows * case.query_len, heads.num_heads, heads.head_dim).bfloat16()
    out = torch.empty_like(q)
    query_start_loc = torch.arange(case.num_rows + 1, dtype=torch.int32) * case.query_len
    seq_lens = torch.full((case.num_rows,), case.seq_len, dtype=torch.int32)
    tables = [torch.randperm(num_blocks).int().view(case.num_rows, width) for _ in range(case.num_caches)]
    graph = ops.CpuGraph()
    with graph.capture():
        for (k, v), table in zip(caches, tables, strict=True):
            ops.paged_attention(out, q, k, v, table, query_start_loc, seq_lens, case.query_len, heads.head_dim**-0.5)
    captured = (caches, tables, query_start_loc, seq_lens, q, out)  # a graph knows addresses only: these must live on

    def turn() -> None:
        assert captured
        graph.replay()

    return turn


def torch_turn(case: Case) -> Callable[[], None]:
    """torch on every cache once, its blocks gathered."""
    heads = case.heads
    gathered = in_huge_pages(case.num_caches, 2, case.num_rows, heads.num_kv_heads, case.seq_len, heads.head_dim)
    is_decode = case.query_len == 1
    if is_decode:
        q = torch.randn(case.num_rows, heads.num_kv_heads, heads.num_heads // heads.num_kv_heads, heads.head_dim)
    else:
        q = torch.randn(case.num_rows, heads.num_heads, case.query_len, heads.head_dim)
    q = q.bfloat16()
    mask = None
    if 1 < case.query_len < case.seq_len:
        mask = torch.ones(case.query_len, case.seq_len, dtype=torch.bool).tril(case.seq_len - case.query_len)

    def turn() -> None:
        for k, v in gathered:
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=case.query_len == case.seq_len, enable_gqa=not is_decode
            )

    return turn


def in_huge_pages(*shape: int) -> Tensor:
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    ops.request_huge_pages(tensor)
    return tensor.normal_()


def measure(case: Case, rounds: int, *turns: Callable[[], None]) -> list[float]:
    """Median seconds of one call in each turn.

    Calls are repeated: a turn's first ones find cold caches and sleeping threads.
    """
    repeats = max(1, int(5e9 / (case.operations + 10 * case.bytes) / case.num_caches))

    def repeated(turn: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeats):
                turn()

        return run

    seconds = alternate(rounds, statistics.median, *map(repeated, turns))
    return [turn_seconds / repeats / case.num_caches for turn_seconds in seconds]


def peer_row(case: Case, seconds: float, peer: str, peer_seconds: float, suffix: str = "") -> report.Row:
    amount, unit = (case.bytes / 1e9, "GB/s") if case.query_len == 1 else (case.operations / 1e9, "GFLOP/s")
    return report.row(case.name + suffix, amount / seconds, unit, peer, amount / peer_seconds, higher_is_better=True)


def case_rows(case: Case, rounds: int, ceiling: Ceiling) -> list[report.Row]:
    seconds, torch_seconds = measure(case, rounds, paged_turn(case), torch_turn(case))
    floor = max(case.bytes / ceiling.read, case.operations / ceiling.multiply)
    return [peer_row(case, seconds, "floor", floor), peer_row(case, seconds, "torch SDPA", torch_seconds)]


def block_size_rows(rounds: int) -> list[report.Row]:
    """Decoding from memory with larger blocks."""
    cases = [Case(SMALL, 32, 512, num_caches=NUM_LAYERS, block_size=size) for size in (16, 32, 64)]
    base, *others = measure(cases[0], rounds, *map(paged_turn, cases))
    return [
        peer_row(case, seconds, "blocks of 16", base, f" in blocks of {case.block_size}")
        for case, seconds in zip(cases[1:], others, strict=True)
    ]


def instruction_set_rows(rounds: int) -> list[report.Row]:
    """What products of bfloat16 pairs bring over widening to float32."""
    rows = []
    for case in (Case(SMALL, 32, 512, num_caches=NUM_LAYERS), Case(SMALL, 1, 512, 512)):
        turn = paged_turn(case)

        def on(name: str, turn: Callable[[], None] = turn) -> None:
            _kernels.cpu.set_isa_for_testing(name)
            turn()

        pairs, floats = measure(case, rounds, lambda: on("avx512_bf16"), lambda: on("avx512"))
        rows.append(peer_row(case, pairs, "avx512 without bf16", floats))
    _kernels.cpu.set_isa_for_testing("avx512_bf16")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if ops.instruction_set() != "avx512_bf16":
        raise SystemExit(f"error: measures bfloat16 dot products, and this processor is {ops.instruction_set()}")
    torch.manual_seed(0)
    torch.set_num_threads(ops.num_threads())
    with tempfile.TemporaryDirectory() as folder:
        ceiling = measure_ceiling(build_ceiling_program(Path(folder)))
    figures: list[report.Row] = []
    with torch.inference_mode():
        for case in CASES:
            figures += case_rows(case, arguments.rounds, ceiling)
        figures += block_size_rows(arguments.rounds)
        figures += instruction_set_rows(arguments.rounds)
    notes = (
        f"{ops.num_threads()} threads, blocks of 16 unless said otherwise; reading memory {ceiling.read / 1e9:.1f} GB/s, "
        f"dot products {ceiling.multiply / 1e9:.0f} GFLOP/s"
    )
    report.write("cpu_attention", figures, notes)


if __name__ == "__main__":
    main()
