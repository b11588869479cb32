"""Decode speed beside a process that keeps one core busy, as share of the speed on a quiet machine: the OpenMP trap.

Usage: python benchmarks/engine/busy_neighbour.py [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.engine.cpu_engine import PEERS, Worker
from benchmarks.peers.worker import Case
from pagedcore.serve.default_model import ensure_default_model

CASES = [Case(batch, 128, 24) for batch in (1, 8, 32)]
BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, threads = str(ensure_default_model()), str(len(os.sched_getaffinity(0)))
    arguments = [model, "bfloat16", threads]
    workers = {
        "pagedcore": Worker([sys.executable, str(PEERS / "pagedcore_worker.py"), *arguments]),
        "transformers": Worker([sys.executable, str(PEERS / "transformers_worker.py"), *arguments]),
    }
    rows = []
    for case in CASES:
        kept = {name: share_kept(worker, case, options.repeats) for name, worker in workers.items()}
        rows.append(
            report.row(
                f"decode speed kept beside a busy core, batch {case.batch}",
                100 * kept["pagedcore"],
                "%",
                "transformers",
                100 * kept["transformers"],
                higher_is_better=True,
            )
        )
    for worker in workers.values():
        worker.close()
    report.write(
        "busy_neighbour", rows, f"SmolLM2-135M, bfloat16, {threads} threads on as many cores, one other busy process"
    )


def share_kept(worker: Worker, case: Case, repeats: int) -> float:
    """Median decode rate beside a busy process over the median rate without one, in turns."""
    quiet, busy = [], []
    worker.run(Case(case.batch, case.context, 2))
    for _ in range(repeats):
        quiet.append(worker.run(case).decode)
        neighbour = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            time.sleep(0.2)
            busy.append(worker.run(case).decode)
        finally:
            neighbour.kill()
            neighbour.wait()
    return statistics.median(quiet) / statistics.median(busy)


if __name__ == "__main__":
    main()
