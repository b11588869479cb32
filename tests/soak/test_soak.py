"""A short soak; `make soak` is the long one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from pagedcore.serve.triton_server import TritonServer
from tests.soak.client import Outcome
from tests.soak.repository import write_repository
from tests.soak.run import Soak, leftovers
from tests.soak.watch import Sample


def test_mixed_traffic_leaves_nothing_behind(tmp_path: Path) -> None:
    with TritonServer(write_repository(tmp_path), log_path=tmp_path / "log", exit_timeout=2) as server:
        soak = Soak(server, num_clients=32, seed=3)
        asyncio.run(soak.run(400))
    assert soak.faults == []
    assert sum(soak.outcomes.values()) == 400
    assert all(soak.outcomes[kind] > 0 for kind in (Outcome.ANSWERED, Outcome.GONE, Outcome.REFUSED))
    assert soak.num_canaries > 2


def test_what_is_left_is_found() -> None:
    idle = Sample(
        memory=100.0,
        num_threads=20,
        num_model_threads=10,
        num_files=30,
        num_regions=1,
        region_mib=1.0,
        kv_usage=0.0,
        num_running=0.0,
        num_waiting=0.0,
    )
    assert leftovers(idle, idle) == []
    assert leftovers(idle, replace(idle, num_files=31)) == ["num_files grew from 30 to 31"]
    assert len(leftovers(idle, replace(idle, kv_usage=0.01, num_model_threads=11))) == 2
