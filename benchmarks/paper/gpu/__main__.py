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
import sys
import traceback
from pathlib import Path

from benchmarks import report
from benchmarks.paper.gpu import kernels, rates, step_times
from benchmarks.paper.gpu.panels import PANELS
from benchmarks.paper.gpu.record import FOLDER, Recorder, TimeBox
from benchmarks.paper.gpu.serving import SHAPES, Server, free_memory

PARTS = ("fig18a", "steps", "fig12", "fig14", "fig17", "fig16", "fig19", "fig18b")
LLAMA_PARTS = ("fig16",)  # the paper's model there
TINY_SLOTS = 15_700  # on a CPU: the largest of any panel's


class ServerSlot:
    """Room for one model on the device; parts of the same shape share what is in it."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._server: Server | None = None

    def get(self, shape: str) -> Server:
        """A server of this shape: the one that is there, or a new one in its place."""
        if self._server is None or self._server.shape != shape:
            self.clear()
            self._server = Server(shape, self._device, num_slots=None if self._device == "cuda" else TINY_SLOTS)
        return self._server

    def clear(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
        free_memory()


def run(part: str, arguments: argparse.Namespace, slot: ServerSlot, box: TimeBox) -> None:
    """Measure one part, as far as there is time."""
    device = arguments.device
    shape = arguments.shape or ("llama13b" if part in LLAMA_PARTS else "opt13b")
    source = report.source(arguments.commit)
    recorder = Recorder(arguments.out, part, shape, source, resume=not arguments.fresh)
    kernel_shape = shape if shape in kernels.SHAPES else "opt13b"
    if part == "steps":
        step_times.measure(slot.get(shape), recorder, box)
    elif part in PANELS:
        rates.panels_of(part, recorder, slot.get(shape), box, arguments.scale)
    else:
        slot.clear()
        if part == "fig18a":
            kernels.attention(kernel_shape, device, recorder, box)
        elif part == "fig18b":
            rates.block_sizes(recorder, shape, device, box, arguments.scale)
        else:
            kernels.moves(kernel_shape, device, recorder, box)
            rates.preemption(recorder, shape, device, box, arguments.scale, 8.0 if device == "cuda" else 0.25)


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
    slot = ServerSlot(arguments.device)
    failed = []
    for part in arguments.part or PARTS:
        if not box.has(0.0):
            break
        try:
            run(part, arguments, slot, box)
        except Exception:  # time on the device is dear: the other parts are measured all the same
            traceback.print_exc()
            failed.append(part)
        if failed:
            slot.clear()  # whatever state it is in
    slot.clear()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
