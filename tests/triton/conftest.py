"""The real tritonserver with the real model, once for all tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedcore.serve.default_model import ensure_default_model
from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import MODEL, metric, wait_until
from tests.triton.judge import Judge

ROOT = Path(__file__).parent.parent.parent
# float32, because its greedy tokens equal transformers'; a short context, so that prompts that do not fit stay small.
ENGINE_ARGUMENTS: dict[str, Any] = {
    "model": "SmolLM2-135M-Instruct",
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "num_gpu_blocks_override": 2048,
}


def write_repository(folder: Path, **arguments: Any) -> Path:
    """A copy of the project's model repository with other engine arguments."""
    repository = folder / "model_repository"
    shutil.copytree(ROOT / "model_repository", repository)
    write_arguments(repository, **arguments)
    return repository


def write_arguments(repository: Path, **arguments: Any) -> None:
    (repository / MODEL / "1" / "model.json").write_text(json.dumps(ENGINE_ARGUMENTS | arguments))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("triton")
    with TritonServer(write_repository(folder), log_path=folder / "tritonserver.log", exit_timeout=5) as running:
        yield running


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server with little room: prompts take many steps, requests queue up, and running ones are preempted."""
    folder = tmp_path_factory.mktemp("small")
    repository = write_repository(
        folder,
        max_num_seqs=4,
        num_gpu_blocks_override=80,
        max_num_batched_tokens=32,
        enable_prefix_caching=False,
        max_queue_size=3,
        max_queue_tokens=1500,
    )
    with TritonServer(repository, log_path=folder / "tritonserver.log", exit_timeout=5) as running:
        yield running


@pytest.fixture(scope="session")
def judge() -> Judge:
    return Judge(ensure_default_model())


@pytest.fixture
def all_blocks_free(server: TritonServer) -> Iterator[Callable[[], bool]]:
    """Whether every KV block is free; checked before and after the test too."""

    def check() -> bool:
        free = metric(server.metrics_url, "pagedcore:kv_blocks_free")
        return free == metric(server.metrics_url, "pagedcore:kv_blocks_total")

    wait_until(check)
    yield check
    wait_until(check)
