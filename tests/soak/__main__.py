"""Mixed traffic to a real tritonserver for a long time, and what it leaves behind.

Usage: python -m tests.soak [--requests N] [--clients N] [--seed S] [--overload SECONDS] [--record]
    [--device cuda] [--seconds S] [--tritonserver FILE]

A model of two small layers with random weights and the default model's tokenizer, so that a processor gets through many requests.
The exit status is 0 if every request had its one right end, every canary the same text, and nothing was left.
--record writes benchmarks/results/soak.json and docs/soak.png; with --device cuda, soak_gpu.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import report
from pagedcore.serve.triton_install import ensure_tritonserver
from pagedcore.serve.triton_server import TritonServer
from tests.soak.repository import GPU_ARGUMENTS, write_repository
from tests.soak.results import record
from tests.soak.run import Soak
from tests.soak.traffic import LENGTH_SCALE

# By what the traces' lengths are divided, and the KV blocks of a server with room for such requests. Of the short ones of the
# soak, a machine spends nearly as much on each that it refuses, and on asking, as on one that it answers.
OVERLOADS = {"": (LENGTH_SCALE, 128), ", requests four times as long": (LENGTH_SCALE // 4, 256)}


@contextmanager
def serve(arguments: argparse.Namespace, **changed: Any) -> Iterator[TritonServer]:
    """A server of the small model."""
    device = GPU_ARGUMENTS if arguments.device == "cuda" else {}
    installation = ensure_tritonserver(arguments.tritonserver)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repository = write_repository(folder, **device, **changed)
        with TritonServer(repository, installation=installation, log_path=folder / "log", exit_timeout=2) as server:
            yield server


def overload(soak: Soak, arguments: argparse.Namespace) -> None:
    """Put what comes of twice the sustained rate, on servers of their own, into `soak`."""
    for name, (length_scale, num_blocks) in OVERLOADS.items():
        with serve(arguments, num_gpu_blocks_override=num_blocks) as server:
            measured = Soak(server, arguments.clients, arguments.seed, length_scale)
            soak.overloads[name] = asyncio.run(measured.overload(arguments.overload))
        soak.faults += measured.faults


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--requests", type=int, default=100_000)
    options.add_argument("--seconds", type=float, default=0.0, help="go on for so long instead")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--tritonserver", type=Path)
    options.add_argument("--clients", type=int, default=48, help="requests that are open at any time")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument(
        "--overload", type=float, default=30.0, help="seconds at twice the rate that it sustains; 0: not"
    )
    options.add_argument(
        "--record", action="store_true", help="write the figures to benchmarks/results and the picture"
    )
    arguments = options.parse_args()
    logging.disable(logging.CRITICAL)
    commit = report.current_commit()
    with serve(arguments) as server:
        soak = Soak(server, arguments.clients, arguments.seed)
        asyncio.run(soak.run(arguments.requests, arguments.seconds))
    if arguments.overload > 0:
        overload(soak, arguments)
    print(f"before: {soak.before}\nafter:  {soak.after}")
    for name, rates in soak.overloads.items():
        print(f"{rates.peak:.0f} answered a second, {rates.goodput:.0f} at twice that rate{name}")
    for fault in soak.faults[:20]:
        print(fault)
    if arguments.record:
        record(soak, commit, "soak_gpu" if arguments.device == "cuda" else "soak")
    return int(bool(soak.faults))


if __name__ == "__main__":
    sys.exit(main())
