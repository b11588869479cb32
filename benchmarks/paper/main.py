"""Reproduce the PagedAttention paper's experiments that need no GPU: pictures, benchmarks/results/paper.json, docs/paper.md.

What was measured on a GPU (benchmarks/data/paper_gpu, by `make paper-gpu`) is drawn as well: benchmarks/results/paper_gpu.json.

Usage: python benchmarks/paper/main.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.paper import gpu_figures, latency, memory, page, shapes, sharing
from benchmarks.paper.gpu.step_times import step_time_of
from benchmarks.paper.runs import run_sweeps

NOTES = (
    "the real scheduler, block manager and buddy allocator on a clock, no GPU; every time is modelled (docs/paper.md). "
    "Against 'paper', the ratio is ours / the paper's and judges nothing"
)


def main() -> None:
    begin, source = time.monotonic(), report.source()  # before the pictures change the tree
    measured = gpu_figures.records()
    gpu_time = step_time_of(measured["steps"]) if "steps" in measured else None
    sweeps = memory.sweeps() | latency.sweeps(gpu_time) | sharing.sweeps()
    points = dict(zip(sweeps, run_sweeps(list(sweeps.values())), strict=True))
    rows = (
        shapes.step_times()
        + shapes.table_1()
        + shapes.figure_1_left()
        + memory.figure_1_right(points)
        + memory.figure_2(points)
        + memory.waste_by_cause(points)
    )
    rows += memory.waste_by_block_size(points) + shapes.figure_3() + shapes.figure_11() + latency.figure_12(points)
    rows += (
        memory.figure_13(points)
        + memory.published_traces(points)
        + latency.figure_14(points)
        + sharing.figure_15(points)
    )
    rows += latency.figure_16(points) + latency.figure_17(points)
    report.write("paper", rows, NOTES, source)
    gpu_figures.write(measured, latency.on_gpu_steps(points))
    page.write()
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
