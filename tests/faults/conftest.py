"""A real tritonserver whose model fails on request, and what its tests measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import MODEL
from tests.triton.repository import ROOT, write_repository

Measure = Callable[[float, float], None]


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """80 blocks, and twice as many on the host."""
    folder = tmp_path_factory.mktemp("faulty")
    repository = write_repository(
        folder,
        max_num_seqs=8,
        num_gpu_blocks_override=80,
        swap_space=0.11,
        preemption_mode="swap",
        enable_prefix_caching=False,
    )
    model = f"import sys\nsys.path.append({str(ROOT)!r})\nfrom tests.faults.faulty_model import TritonPythonModel\n"
    (repository / MODEL / "1" / "model.py").write_text(model)
    with TritonServer(repository, log_path=folder / "log", extra_args=["--exit-timeout-secs=5"]) as running:
        yield running


@pytest.fixture
def measure(record_property: Callable[[str, object], None]) -> Measure:
    """Takes what a fault's page is to show: seconds, and how many they may be."""

    def record(seconds: float, bound: float) -> None:
        assert seconds < bound
        record_property("seconds", seconds)
        record_property("bound", bound)

    return record
