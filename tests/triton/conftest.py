"""The real tritonserver with the real model, once for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pagedcore.serve.default_model import ensure_default_model
from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import metric, wait_until
from tests.triton.judge import Judge
from tests.triton.repository import write_repository


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
