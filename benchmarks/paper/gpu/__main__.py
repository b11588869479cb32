"""Measure what the paper's figures need a GPU for, part by part, each within a time of its own and resumable.

Usage: python -m benchmarks.paper.gpu [--part PART ...] [--minutes M] [--out FOLDER] [--scale S] [--fresh] [--commit ID]
                                      [--device cuda|cpu] [--shape opt13b|llama13b|tiny]

Parts: fig18a steps fig12 fig14 fig17 fig16 fig19 fig18b, or all of them in this order. Each writes FOLDER/PART.json after every
point it has measured. What is in there already, or in benchmarks/data/paper_gpu, is not measured again unless --fresh is
given, so that a part that ran out of time goes on in the next call. `make paper` draws what is in benchmarks/data/paper_gpu.
Needs neither git nor matplotlib.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import report
from benchmarks.paper.gpu import kernels, rates, step_times
from benchmarks.paper.gpu.panels import PANELS
from benchmarks.paper.gpu.record import FOLDER, Recorder, TimeBox
from benchmarks.paper.gpu.serving import SHAPES, Server

PARTS = ("fig18a", "steps", "fig12", "fig14", "fig17", "fig16", "fig19", "fig18b")
LLAMA_PARTS = ("fig16",)  # the paper's model there
TINY_SLOTS = 15_700  # on a CPU: the largest of any panel's


def run(part: str, arguments: argparse.Namespace, server: Server | None, box: TimeBox) -> Server | None:
    """One part; returns the server, which the next part of the same shape uses."""
    device = arguments.device
    shape = arguments.shape or ("llama13b" if part in LLAMA_PARTS else "opt13b")
    source = replace(report.source(arguments.commit), command=command())
    recorder = Recorder(arguments.out, part, shape, source, resume=not arguments.fresh)
    kernel_shape = shape if shape in kernels.SHAPES else "opt13b"
    needs_server = part == "steps" or part in PANELS
    if server is not None and (not needs_server or server.shape != shape):
        server.shutdown()
        server = None
    if needs_server and server is None:
        server = Server(shape, device, num_slots=None if device == "cuda" else TINY_SLOTS)
    if part == "fig18a":
        kernels.attention(kernel_shape, device, recorder, box)
    elif part == "fig18b":
        rates.block_sizes(recorder, shape, device, box, arguments.scale)
    elif part == "fig19":
        kernels.moves(kernel_shape, device, recorder, box)
        rates.preemption(recorder, shape, device, box, arguments.scale, 8.0 if device == "cuda" else 0.25)
    elif server is not None and part == "steps":
        step_times.measure(server, recorder, box)
    elif server is not None:
        rates.panels_of(part, recorder, server, box, arguments.scale)
    return server


def command() -> str:
    return "python -m benchmarks.paper.gpu " + shlex.join(sys.argv[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="again for more; default: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts of this call together")
    parser.add_argument("--commit", help="the commit measured; default: what git or the file .commit says")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--scale", type=float, default=1.0, help="of the length of every run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: the paper's model of the part")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    arguments = parser.parse_args()
    box = TimeBox(60 * arguments.minutes)
    server: Server | None = None
    for part in arguments.part or PARTS:
        if not box.has(0.0):
            break
        server = run(part, arguments, server, box)
    if server is not None:
        server.shutdown()


if __name__ == "__main__":
    main()
