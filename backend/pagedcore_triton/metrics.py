"""Exports the engine's state to Triton's metrics endpoint."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from pagedcore.engine.outputs import EngineStats

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 0.05

GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_requests_running": ("Number of requests being computed.", lambda stats: stats.num_running),
    "vllm:num_requests_waiting": ("Number of requests waiting to be computed.", lambda stats: stats.num_waiting),
    "vllm:gpu_cache_usage_perc": (
        "Share of the KV cache's blocks in use; 1 is all.",
        lambda stats: 1 - stats.num_free_blocks / stats.num_blocks,
    ),
    "pagedcore:kv_blocks_free": (
        "Number of KV blocks that are free or evictable.",
        lambda stats: stats.num_free_blocks,
    ),
    "pagedcore:kv_blocks_total": ("Number of KV blocks.", lambda stats: stats.num_blocks),
}


class Metrics:
    """A thread that keeps the gauges up to date. It owns them: one Triton metric used from two threads ends the server."""

    def __init__(self, stats: Callable[[], EngineStats], labels: dict[str, str]) -> None:
        self._stats = stats
        self._families: list[Any] = []  # Triton wants them to outlive their metrics
        self._gauges: list[tuple[Any, Callable[[EngineStats], float]]] = []
        self._shown: list[float | None] = [None] * len(GAUGES)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(labels,), name="pagedcore-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread; `timeout` in seconds."""
        self._stopping.set()
        self._thread.join(timeout)

    def _run(self, labels: dict[str, str]) -> None:
        try:
            for name, (description, value) in GAUGES.items():
                family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.GAUGE)
                self._families.append(family)
                self._gauges.append((family.Metric(labels=labels), value))
        except pb_utils.TritonModelException as error:
            logger.warning("no metrics: %s", error)  # the server runs with --allow-metrics=false
            return
        while not self._stopping.wait(PERIOD_SECONDS):
            self._export(self._stats())
        # Released by the interpreter's end instead, they would reach for a stub that is gone, and crash.
        self._gauges.clear()
        self._families.clear()

    def _export(self, stats: EngineStats) -> None:
        for number, (gauge, value) in enumerate(self._gauges):
            current = float(value(stats))
            if current != self._shown[number]:
                gauge.set(current)
                self._shown[number] = current
