"""What a server holds, second by second."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pagedcore.serve.triton_server import TritonServer
from tests.serve.processes import processes_with
from tests.triton.clients import metric

IDLE_PATIENCE = 60.0


@dataclass(frozen=True)
class Sample:
    """Of all the server's processes together. Memory in MiB; `kv_usage`: the share of the KV blocks that requests hold."""

    memory: float
    num_threads: int
    num_model_threads: int  # of the model's process; gRPC's pool in the server's comes and goes
    num_files: int
    num_regions: int  # files in /dev/shm
    region_mib: float
    kv_usage: float
    num_running: float
    num_waiting: float
    device_mib: float = 0.0  # in use on the GPU, whoever it is

    @property
    def is_idle(self) -> bool:
        return self.kv_usage == self.num_running == self.num_waiting == 0.0


def device_mib() -> float:
    """Memory in use on the first GPU, as its driver says; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    return (total_bytes - free_bytes) / 2**20


def sample(server: TritonServer) -> Sample:
    """What it holds now."""
    memory, threads, model_threads, files = 0.0, 0, 0, 0
    models = server.stub_processes()
    for pid in processes_with(server.shm_prefix):
        folder = Path("/proc", str(pid))
        memory += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        num_threads = len(list((folder / "task").iterdir()))
        threads += num_threads
        model_threads += num_threads if pid in models else 0
        files += len(list((folder / "fd").iterdir()))
    regions = list(Path("/dev/shm").glob(f"{server.shm_prefix}*"))
    usage, running, waiting = (
        metric(server.metrics_url, f"vllm:{name}")
        for name in ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
    )
    return Sample(
        memory,
        threads,
        model_threads,
        files,
        len(regions),
        sum(path.stat().st_size for path in regions) / 2**20,
        usage,
        running,
        waiting,
        device_mib(),
    )


def idle_sample(server: TritonServer, base: Sample | None = None) -> Sample:
    """What it holds when nobody wants anything, at the latest after IDLE_PATIENCE seconds; connections take a while to be closed.

    `base`: wait until no more threads and files than then are left.
    """
    deadline = time.monotonic() + IDLE_PATIENCE
    while True:
        now = sample(server)
        is_back = base is None or (now.num_threads <= base.num_threads and now.num_files <= base.num_files)
        if (now.is_idle and is_back) or time.monotonic() > deadline:
            return now
        time.sleep(0.5)
