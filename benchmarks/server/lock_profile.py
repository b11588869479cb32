"""Who holds the interpreter lock of the stub process, where engine, request parsing and responses share it.

Usage: python -m benchmarks.server.lock_profile --tokenizer FOLDER --py-spy FILE [--shape qwen06b] [--streams 256]
    [--rounds 12] [--tritonserver FILE] [--perf-analyzer FILE] [--name h200_lock]

py-spy (pip install py-spy) looks at the stub a few hundred times a second while perf_analyzer keeps it busy as in gpu_server.py,
and tells which Python function holds the lock, if any does.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import report
from benchmarks.server.closed_loop import Load, server_load
from benchmarks.server.gpu_server import OUTPUT_TOKENS, PROMPT, TITLES, write_model, write_repository
from pagedcore.serve.triton_install import ensure_tritonserver
from pagedcore.serve.triton_server import TritonServer

RATE = 250  # looks a second
SECONDS = 8  # of looking
BEGIN_SECONDS = 5.0  # perf_analyzer's own start, and its warm-up
# A stack belongs to the first of these that one of its frames contains: a function and its file, as py-spy writes them.
PARTS = (
    ("taking requests in: tokenizing", ("encode_prompt (",)),
    ("taking requests in: the rest", ("TritonPythonModel.execute (",)),
    ("engine: planning a step", ("Scheduler.schedule (",)),
    ("engine: starting a step", ("CudaExecutor.launch (",)),
    ("engine: waiting for the device", ("CudaPendingStep.wait (",)),
    ("engine: taking what a step drew", ("Scheduler.commit (",)),
    ("engine: handing tokens to streams", ("EngineThread._deliver (",)),
    ("engine: the rest", ("EngineThread.",)),
    ("responses: tensors and sending", ("TritonChannel.send (",)),
    ("responses: texts", ("sequence_output.py",)),
    ("responses: the rest", ("Lane._run (",)),
    ("cancellation", ("cancellation.py",)),
    ("metrics", ("metrics.py", "telemetry.py")),
)
OTHER = "other"


def part_of(stack: str) -> str:
    """Which of PARTS a stack belongs to."""
    return next((name for name, marks in PARTS if any(mark in stack for mark in marks)), OTHER)


def count_stacks(folded: str) -> Counter[str]:
    """Looks by part, from py-spy's raw output: a line of frames, outermost first, and a number for each stack."""
    counts: Counter[str] = Counter()
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        counts[part_of(stack)] += int(count)
    return counts


def look(py_spy: Path, process: int, output: Path) -> Counter[str]:
    """Look at who holds the lock for SECONDS."""
    command = [str(py_spy), "record", "--pid", str(process), "--gil", "--nonblocking", "--function", "--format", "raw"]
    command += ["--rate", str(RATE), "--duration", str(SECONDS), "--output", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return count_stacks(output.read_text(encoding="utf-8"))


def measure(server: TritonServer, arguments: argparse.Namespace, folder: Path) -> tuple[Counter[str], Load]:
    """Looks by part, and what was served meanwhile."""
    (stub,) = server.stub_processes()

    def load(rounds: int) -> Load:
        url, streams = server.grpc_url, arguments.streams
        return server_load(arguments.perf_analyzer, url, "llm", PROMPT, streams, rounds, OUTPUT_TOKENS, folder)

    load(1)
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(load, arguments.rounds)
        time.sleep(BEGIN_SECONDS)
        counts = look(arguments.py_spy, stub, folder / "stacks.txt")
        if served.done():
            raise RuntimeError("the load ended before the profile: give more --rounds")
        return counts, served.result()


def rows_of(title: str, counts: Counter[str]) -> list[report.Row]:
    """Per cent of the time; what is missing to 100, nobody held the lock."""
    looks = RATE * SECONDS
    names = [name for name, _ in PARTS] + [OTHER]
    rows = [(name, 100 * counts[name] / looks) for name in names if counts[name]]
    rows.append(("all", 100 * counts.total() / looks))
    return [
        report.row(f"{title}, {name}", share, "%", "all the time", 100.0, higher_is_better=False)
        for name, share in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--py-spy", type=Path, default=Path("py-spy"))
    parser.add_argument("--shape", choices=tuple(TITLES), default="qwen06b")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tritonserver", type=Path)
    parser.add_argument("--perf-analyzer", type=Path, default=Path("perf_analyzer"))
    parser.add_argument("--name", default="h200_lock", help="of the result file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repository = write_repository(
            folder, arguments.shape, write_model(folder, arguments.shape, arguments.tokenizer)
        )
        installation = ensure_tritonserver(arguments.tritonserver)
        with TritonServer(repository, installation=installation, ready_timeout=120) as server:
            counts, served = measure(server, arguments, folder)
    print(f"{served.tokens_per_second:.0f} tokens/s, {served.tokens_per_response:.1f} a response", flush=True)
    notes = (
        f"{arguments.streams} streams as in gpu_server.py, {served.tokens_per_second:.0f} tokens/s meanwhile in "
        f"responses of {served.tokens_per_response:.1f}; py-spy, {RATE} looks "
        f"a second for {SECONDS} s; a part's share is of the time in which a thread with it in its stack held the lock"
    )
    report.write(arguments.name, rows_of(f"{TITLES[arguments.shape]}, {arguments.streams} streams", counts), notes)


if __name__ == "__main__":
    main()
