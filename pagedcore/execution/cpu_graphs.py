"""Graphs of the CPU kernel calls of recurring steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from pagedcore import ops


class CpuGraphs:
    """Captures kernel calls and replays them where the same ones recur.

    A step's few hundred calls then cost no Python between them, and other threads' Python cannot hold them up: the GIL is
    released once. What the calls read and write must lie at the same addresses whenever the same key is given.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._graphs: dict[Hashable, ops.CpuGraph] = {}

    def run(self, key: Hashable | None, calls: Callable[[], object]) -> None:
        """Run what `calls` calls: from the graph kept under `key`, or captured anew (and not kept under None)."""
        if not self._enabled:
            calls()
            return
        graph = self._graphs.get(key)
        if graph is None:
            graph = ops.CpuGraph()
            with graph.capture():
                calls()
            if key is not None:
                self._graphs[key] = graph
        graph.replay()
