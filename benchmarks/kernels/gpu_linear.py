"""The linear layers of small batches on a GPU, in microseconds, against torch and the read limit in the same run.

Usage: python -m benchmarks.kernels.gpu_linear [--name h100_linear]

bfloat16. Calls go round copies of the weight that together exceed the L2 cache several times, and are replayed from a
graph. "floor" is reading the weight once at the rate of a plain reduction over 2 GB.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks import report
from benchmarks.kernels.gpu_timing import microseconds, read_limit
from pagedcore import ops

ROTATED_BYTES = 400 << 20
ROWS = (1, 8, 16, 32)
# out_features, in_features
SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "8B head": (128256, 4096),
    "0.6B qkv": (4096, 1024),
    "0.6B o": (1024, 2048),
    "0.6B gate_up": (6144, 1024),
    "0.6B down": (1024, 3072),
}


def shape_rows(name: str, out_features: int, in_features: int, bytes_per_microsecond: float) -> list[report.Row]:
    num_bytes = 2 * out_features * in_features
    weights = [
        torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
        for _ in range(max(1, ROTATED_BYTES // num_bytes))
    ]
    figures = []
    for num_tokens in ROWS:
        x = torch.randn(num_tokens, in_features, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(num_tokens, out_features, device="cuda", dtype=torch.bfloat16)
        ours = microseconds([partial(ops.linear, x, weight, None, out, skinny=True) for weight in weights])
        torch_time = microseconds([partial(torch.mm, x, weight.t(), out=out) for weight in weights])
        for peer, peer_time in (("torch", torch_time), ("floor", num_bytes / bytes_per_microsecond)):
            figures.append(
                report.row(f"{name}, {num_tokens} rows", ours, "us", peer, peer_time, higher_is_better=False)
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="h100_linear", help="of the result file")
    arguments = parser.parse_args()
    limit = read_limit()
    figures: list[report.Row] = []
    for name, (out_features, in_features) in SHAPES.items():
        figures += shape_rows(name, out_features, in_features, limit)
        torch.cuda.empty_cache()
    report.write(arguments.name, figures, f"read limit {limit / 1e6:.2f} TB/s")


if __name__ == "__main__":
    main()
