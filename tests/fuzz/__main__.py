"""Fuzz the request parser and, more slowly, a real server.

Usage: python -m tests.fuzz [--first SEED] [--cases N] [--seconds S] [--server-cases N] [--record]

Cases are made in batches, each from a seed of its own, from --first on. The first faulty case is made small and shown with the
command that shows it again; the exit status is then not 0. --record writes benchmarks/results/fuzz.json and
fuzz_server.json, also while it goes on.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import report
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.serve.triton_server import TritonServer
from pagedcore.text import load_tokenizer
from tests.fuzz import parser, server
from tests.fuzz.process import Holdings, holdings
from tests.serve.processes import processes_with
from tests.triton.repository import write_repository

BATCH = 10_000
SERVER_BATCH = 500
NUM_BLOCKS = 128  # so few that all have been written to, and are resident memory, after the first batch
GOAL_CASES = 1_000_000
GOAL_SERVER_CASES = 10_000
GOAL_CASES_PER_SECOND = 500
GOAL_MIB = 64.0
GOAL_MS = 100.0


@dataclass
class Progress:
    """What has been done so far. `..._growth`: of what the processes hold, since their first batch."""

    commit: str
    records: bool
    num_taken: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    growth: Holdings = field(default_factory=Holdings)
    http_answers: Counter[str] = field(default_factory=Counter)
    grpc_answers: Counter[str] = field(default_factory=Counter)
    server_growth: Holdings = field(default_factory=Holdings)
    refusal_ms: list[float] = field(default_factory=list)

    @property
    def num_cases(self) -> int:
        return self.num_taken + self.refusals.total()


def fuzz_parser(progress: Progress, first: int, num_cases: int, seconds: float) -> None:
    """One batch after another, for so many cases, or about so many seconds of processor time."""
    tokenizer = load_tokenizer(ensure_default_model())
    begin, warm = time.process_time(), None
    for number in range(math.ceil(num_cases / BATCH)):
        if progress.seconds > seconds:
            return
        count = min(BATCH, num_cases - number * BATCH)
        try:
            tally = parser.fuzz(tokenizer, count, first + number)
        except Exception:
            print(f"again: python -m tests.fuzz --first {first + number} --cases {count} --server-cases 0", flush=True)
            raise
        progress.num_taken += tally.num_taken
        progress.refusals += tally.refusals
        progress.seconds = time.process_time() - begin
        now = holdings([os.getpid()])
        warm = warm or now
        progress.growth = now.since(warm)
        print(f"{progress.num_cases} cases, {progress.num_taken} taken, {progress.growth}", flush=True)
        record_parser(progress)


def fuzz_server(progress: Progress, first: int, num_cases: int) -> None:
    """The table of bad inputs, then random bodies and messages, all beside a good request."""
    with tempfile.TemporaryDirectory() as folder:
        repository = write_repository(Path(folder), num_gpu_blocks_override=NUM_BLOCKS)
        with TritonServer(repository, log_path=Path(folder, "log")) as running:
            with server.neighbour(running):
                server.refusal_seconds(running)  # the first of each kind take longer
                progress.refusal_ms = [seconds * 1e3 for seconds in server.refusal_seconds(running)]
            warm = None
            for number in range(math.ceil(num_cases / SERVER_BATCH)):
                with server.neighbour(running):
                    progress.http_answers += server.fuzz_http(running, SERVER_BATCH // 2, first + number)
                    progress.grpc_answers += server.fuzz_grpc(running, SERVER_BATCH // 2, first + number)
                now = holdings(processes_with(running.shm_prefix))
                warm = warm or now
                progress.server_growth = now.since(warm)
                print(progress.http_answers, progress.grpc_answers, progress.server_growth, flush=True)
                record_server(progress)


def record_parser(progress: Progress) -> None:
    """Write benchmarks/results/fuzz.json, if that is wanted."""
    if not progress.records:
        return
    speed = progress.num_cases / progress.seconds
    rows = [
        report.row("requests parsed", progress.num_cases, "cases", "goal", GOAL_CASES, higher_is_better=True),
        report.row(
            "requests parsed per second of processor time",
            speed,
            "1/s",
            "goal",
            GOAL_CASES_PER_SECOND,
            higher_is_better=True,
        ),
        _growth("the parser's memory grew by", progress.growth),
    ]
    notes = (
        f"no crash, and no error that is not a refusal; {progress.num_taken} requests were taken, the others refused; file "
        f"descriptors more than after the first batch: {progress.growth.num_files}"
    )
    report.write("fuzz", rows, notes, measured=report.source(progress.commit))


def record_server(progress: Progress) -> None:
    """Write benchmarks/results/fuzz_server.json, if that is wanted."""
    if not progress.records:
        return
    rows = []
    for name, percentile in (("half", 50), ("99 %", 99), ("all", 100)):
        name = f"{len(progress.refusal_ms)} bad inputs beside a good request: {name} answered within"
        within = float(np.percentile(progress.refusal_ms, percentile))
        rows.append(report.row(name, within, "ms", "goal", GOAL_MS, higher_is_better=False))
    for name, answers in (("HTTP bodies", progress.http_answers), ("gRPC messages", progress.grpc_answers)):
        rows.append(
            report.row(f"{name} sent", answers.total(), "cases", "goal", GOAL_SERVER_CASES / 2, higher_is_better=True)
        )
    rows.append(_growth("the server's memory grew by", progress.server_growth))
    notes = (
        "no crash, no internal error, no neighbour's text changed; answers by HTTP: "
        f"{_listed(progress.http_answers)}; by gRPC: {_listed(progress.grpc_answers)}; file descriptors more than after the "
        f"first batch: {progress.server_growth.num_files}"
    )
    report.write("fuzz_server", rows, notes, measured=report.source(progress.commit))


def _growth(name: str, growth: Holdings) -> report.Row:
    return report.row(name, max(growth.memory, 0.1), "MiB", "goal", GOAL_MIB, higher_is_better=False)


def _listed(answers: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(answers.items()))


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--first", type=int, default=0, help="the first batch's seed")
    options.add_argument("--cases", type=int, default=GOAL_CASES, help="how many cases for the parser")
    options.add_argument(
        "--seconds", type=float, default=86_400.0, help="of processor time, after which the parser is left alone"
    )
    options.add_argument("--server-cases", type=int, default=GOAL_SERVER_CASES, help="how many cases for the server")
    options.add_argument("--record", action="store_true", help="write the figures to benchmarks/results")
    arguments = options.parse_args()
    logging.disable(logging.CRITICAL)
    progress = Progress(report.current_commit(), arguments.record)
    if arguments.server_cases:
        fuzz_server(progress, arguments.first, arguments.server_cases)
    fuzz_parser(progress, arguments.first, arguments.cases, arguments.seconds)


if __name__ == "__main__":
    main()
