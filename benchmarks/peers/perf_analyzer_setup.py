"""Make perf_analyzer's environment: the client wheel of the server's release carries the binary; it runs on glibc 2.35."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pagedcore.serve.cache import SetupError, cache_root

REQUIREMENTS = ("tritonclient[grpc,http]==2.51.0", "nvidia-cuda-runtime-cu12==12.9.79")


def ensure_perf_analyzer() -> Path:
    """Return the folder of perf_analyzer's virtual environment, making it if absent. Raises SetupError without libb64."""
    if ctypes.util.find_library("b64") is None:
        raise SetupError("perf_analyzer needs libb64; on Debian or Ubuntu: apt-get install libb64-0d")
    folder = cache_root() / "peers" / "perf-analyzer"
    if not (folder / "bin" / "perf_analyzer").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    return folder


def run_perf_analyzer(arguments: Sequence[str]) -> None:
    """Run perf_analyzer; raises RuntimeError with its output if it fails."""
    folder = ensure_perf_analyzer()
    (cuda,) = folder.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(cuda)}
    result = subprocess.run(
        [str(folder / "bin" / "perf_analyzer"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"perf_analyzer failed:\n{result.stdout}\n{result.stderr}")
