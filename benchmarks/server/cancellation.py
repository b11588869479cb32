"""From a client's cancellation to the engine's knowledge of it with 256 open requests, and what asking for it costs.

The server, the senders and the cancellation poller are the real ones; the engine only makes up tokens.

Usage: python benchmarks/server/cancellation.py
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpcclient

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from pagedcore.serve.triton_server import TritonServer

NUM_OPEN, NUM_PER_CLIENT, BUDGET_SECONDS = 256, 8, 0.05
WARM_UP_SECONDS, CPU_SECONDS = 3.0, 8.0


def open_streams(server: TritonServer) -> list[grpcclient.InferenceServerClient]:
    """NUM_OPEN requests, NUM_PER_CLIENT on each stream; they do not end by themselves."""
    clients = []
    for first in range(0, NUM_OPEN, NUM_PER_CLIENT):
        client = grpcclient.InferenceServerClient(server.grpc_url)
        client.start_stream(lambda result, error: None)
        for number in range(first, first + NUM_PER_CLIENT):
            text = grpcclient.InferInput("text_input", [1], "BYTES")
            text.set_data_from_numpy(np.array([b"x"], dtype=np.object_))
            client.async_stream_infer("llm", [text], request_id=str(number))
        clients.append(client)
    return clients


def cpu_seconds(server: TritonServer) -> float:
    """Processor time that the server and its model's process have used."""
    ticks = 0
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                command = (process / "cmdline").read_bytes().decode(errors="replace")
                fields = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            if server.shm_prefix in command:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, asks: bool) -> tuple[float, list[float]]:
    """The share of a core that server and model use with all requests open, and seconds from each cancellation to its notice."""
    model = folder / f"asks_{asks}" / "llm"
    (model / "1").mkdir(parents=True)
    shipped = report.ROOT / "model_repository" / "llm"
    shutil.copy(shipped / "config.pbtxt", model / "config.pbtxt")
    shutil.copy(Path(__file__).with_name("cancellation_model.py"), model / "1" / "model.py")
    (model / "1" / "model.json").write_text(json.dumps({"asks": asks}), encoding="utf-8")
    log = model / "1" / "aborted.log"
    with TritonServer(model.parent, log_path=folder / f"asks_{asks}.log", exit_timeout=1) as server:
        clients = open_streams(server)
        time.sleep(WARM_UP_SECONDS)
        used, begin = cpu_seconds(server), time.monotonic()
        time.sleep(CPU_SECONDS)
        share = (cpu_seconds(server) - used) / (time.monotonic() - begin)
        cancelled: dict[str, float] = {}
        for at, client in enumerate(clients) if asks else ():
            cancelled |= {str(at * NUM_PER_CLIENT + number): time.monotonic() for number in range(NUM_PER_CLIENT)}
            client.stop_stream(cancel_requests=True)
            for number in range(at * NUM_PER_CLIENT, (at + 1) * NUM_PER_CLIENT):
                while f"{number} " not in {line.split(" ")[0] + " " for line in log.read_text().splitlines()}:
                    time.sleep(0.002)
        noticed = dict(line.split(" ") for line in log.read_text(encoding="utf-8").splitlines())
    return share, [float(noticed[name]) - at for name, at in cancelled.items()]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        share, seconds = measure(Path(name), asks=True)
        share_unasked, _ = measure(Path(name), asks=False)
    rows = [
        report.row(
            f"cancelled until noticed, up to {NUM_OPEN} open requests, p{percentile}",
            float(np.percentile(seconds, percentile)) * 1e3,
            "ms",
            "budget",
            BUDGET_SECONDS * 1e3,
            higher_is_better=False,
        )
        for percentile in (50, 99)
    ]
    rows.append(
        report.row(
            f"processor use of server and backend, {NUM_OPEN} open requests of 5 tok/s",
            share,
            "cores",
            "not asking",
            share_unasked,
            higher_is_better=False,
        )
    )
    report.write("cancellation", rows, f"gRPC, {NUM_PER_CLIENT} requests on each stream, cancelled stream by stream")


if __name__ == "__main__":
    main()
