"""Timing of GPU work: medians over replays of a captured graph, and the read limit to compare them with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Launch = Callable[[], object]


def microseconds(launches: list[Launch]) -> float:
    """Median time of one launch, over replays of a graph of all of them; at least eight to a graph."""
    torch.cuda.synchronize()
    time.sleep(0.1)  # the driver clears freed memory behind our back, at the cost of bandwidth
    launches = launches * max(1, 8 // len(launches))
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(14):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3 / len(launches))
    return sorted(times[3:])[5]


def read_limit() -> float:
    """Bytes per microsecond of a full reduction over 2 GB."""
    source = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
    return 2 * source.numel() / microseconds([source.sum] * 4)
