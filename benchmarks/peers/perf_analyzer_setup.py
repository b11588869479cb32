"""Make perf_analyzer's environment: the client wheel of the server's release carries the binary; it runs on glibc 2.35."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.environments import ensure_environment
from pagedcore.serve.cache import SetupError

REQUIREMENTS = ("tritonclient[grpc,http]==2.51.0", "nvidia-cuda-runtime-cu12==12.9.79")


def ensure_perf_analyzer() -> Path:
    """Return the folder of perf_analyzer's virtual environment, making it if absent. Raises SetupError without libb64."""
    if ctypes.util.find_library("b64") is None:
        raise SetupError("perf_analyzer needs libb64; on Debian or Ubuntu: apt-get install libb64-0d")
    return ensure_environment("perf-analyzer", REQUIREMENTS, "perf_analyzer")


def perf_analyzer_environment() -> dict[str, str]:
    """The environment in which `perf_analyzer` can be run, by its name too; raises SetupError."""
    folder = ensure_perf_analyzer()
    (cuda,) = folder.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib")
    return {**os.environ, "LD_LIBRARY_PATH": str(cuda), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def run_perf_analyzer(arguments: Sequence[str]) -> str:
    """Run perf_analyzer and return what it prints; raises RuntimeError with its output if it fails."""
    result = subprocess.run(
        [str(ensure_perf_analyzer() / "bin" / "perf_analyzer"), *arguments],
        env=perf_analyzer_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"perf_analyzer failed:\n{result.stdout}\n{result.stderr}")
    return result.stdout
