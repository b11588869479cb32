"""Make perf_analyzer's environment: the client wheel of the server's release carries the binary; it runs on glibc 2.35."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ensure_environment
from pagedcore.serve.cache import SetupError

EXPORT_ATTEMPTS = 10
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


def profile(arguments: Sequence[str], export: Path) -> list[dict[str, Any]]:
    """Run perf_analyzer and return the requests of the file it exports to, `export`.

    It reads the outputs that a response does not have from stale memory, and its file ends at one that is not a number: then
    it is run again. Raises RuntimeError when that does not help.
    """
    for _ in range(EXPORT_ATTEMPTS):
        run_perf_analyzer([*arguments, "--profile-export-file", str(export)])
        try:
            requests: list[dict[str, Any]] = json.loads(export.read_text(encoding="utf-8"))["experiments"][0][
                "requests"
            ]
        except json.JSONDecodeError:
            export.unlink()  # it refuses to overwrite one
        else:
            return requests
    raise RuntimeError(f"perf_analyzer's export was cut off {EXPORT_ATTEMPTS} times")
