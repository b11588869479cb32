"""What `batch_invariant` costs on a GPU: decode steps and first tokens beside those without it, in the same run.

Usage: python -m benchmarks.engine.gpu_invariant [--shapes llama8b,qwen06b] [--name h100_invariant]
"""

from __future__ import annotations

import argparse

from benchmarks import report
from benchmarks.engine.gpu_engine import TITLES, figures
from benchmarks.peers.gpu_worker import DECODED_IN_STEPS, SHAPES

CONTEXT = 128 + 16 + DECODED_IN_STEPS / 2  # of the decode steps, on average


def shape_rows(shape: str) -> list[report.Row]:
    """Figures of one model."""
    plain = figures("pagedcore", shape, None, "--steps")
    invariant = figures("pagedcore", shape, None, "--steps", "--batch-invariant")
    return [
        report.row(f"{TITLES[shape]}, {name}", value, "ms", "without it", plain[name], higher_is_better=False)
        for name, value in invariant.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--name", default="h100_invariant", help="of the result file")
    arguments = parser.parse_args()
    rows: list[report.Row] = []
    for shape in arguments.shapes.split(","):
        rows += shape_rows(shape)
        notes = (
            "batch_invariant beside the same engine without it; random weights, bfloat16, greedy, a context of about "
            f"{CONTEXT:.0f} tokens in the decode steps where none is named"
        )
        report.write(arguments.name, rows, notes)


if __name__ == "__main__":
    main()
