"""Exports the engine's state to Triton's metrics endpoint, from a thread of its own.

A call to a Triton metric is a round trip to the server's process, of 0.03 to 0.1 ms, on the channel that the responses use; two
threads in one metric end the server. So one thread owns them all, sends what has changed ten times a second, and makes
a bounded number of observations.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from pagedcore.engine.outputs import EngineStats
from pagedcore.engine.telemetry import Recorder
from pagedcore_triton.allowance import Allowance
from pagedcore_triton.metric_families import (
    REFUSAL_REASONS,
    Histogram,
    Scalar,
    Snapshot,
    counters,
    gauges,
    histograms,
)
from pagedcore_triton.server_lock import ServerLock

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 0.1
OBSERVATIONS_PER_SECOND = 500.0  # of each histogram, when there are more for long
OBSERVATIONS_AT_ONCE = 1000.0


@dataclass(frozen=True)
class MetricsSource:
    """Where the values come from, and the labels that every line carries."""

    stats: Callable[[], EngineStats]
    recorder: Recorder
    max_model_len: int
    labels: dict[str, str]


class _Line:
    """A gauge's or counter's metric, and what it shows; Triton's begin with 0."""

    def __init__(self, scalar: Scalar, metric: Any) -> None:
        self._metric = metric
        self._shown = 0.0
        self._value = scalar.value

    def set(self, snapshot: Snapshot) -> None:
        """Show the snapshot's value, as a gauge."""
        value = float(self._value(snapshot))
        if value != self._shown:
            self._metric.set(value)
            self._shown = value

    def increment(self, snapshot: Snapshot) -> None:
        """Show the snapshot's value, as a counter."""
        value = float(self._value(snapshot))
        if value != self._shown:
            self._metric.increment(value - self._shown)
            self._shown = value


class _Observer:
    """A histogram's metric, and how much may be observed."""

    def __init__(self, histogram: Histogram, metric: Any) -> None:
        self.values = histogram.values
        self.metric = metric
        self.allowance = Allowance(OBSERVATIONS_PER_SECOND, OBSERVATIONS_AT_ONCE)


class Metrics:
    """The thread, and everything of Triton's metrics: nothing else may touch those."""

    def __init__(self, source: MetricsSource) -> None:
        self._source = source
        self._families: dict[str, Any] = {}  # Triton wants them to outlive their metrics
        self._gauges: list[_Line] = []
        self._counters: list[_Line] = []
        self._histograms: list[_Observer] = []
        self._num_lost = 0
        self._refused = dict.fromkeys(REFUSAL_REASONS, 0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pagedcore-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread; `timeout` in seconds."""
        self._stopping.set()
        self._thread.join(timeout)

    def count_refused(self, reason: str) -> None:
        """Count a request that was answered before it reached the engine, which counts those it refuses. For one thread."""
        self._refused[reason] += 1

    def _run(self) -> None:
        # A model that is loaded anew begins before the one it replaces has ended. Of two metrics with equal labels, Triton
        # deletes what both stand for with the first, and crashes with the next use of the other.
        lock = ServerLock(*(f"{name}={value}" for name, value in sorted(self._source.labels.items())))
        while not lock.try_acquire():
            if self._stopping.wait(PERIOD_SECONDS):
                return
        try:
            self._serve()
        finally:
            # Released by the interpreter's end instead, they would reach for a stub that is gone, and crash.
            self._gauges.clear()
            self._counters.clear()
            self._histograms.clear()
            self._families.clear()
            lock.release()

    def _serve(self) -> None:
        try:
            self._create()
        except pb_utils.TritonModelException as error:
            logger.info("no metrics: %s", error)  # the server runs with --allow-metrics=false
            return
        exported_at = time.monotonic()
        is_failing = False
        while not self._stopping.wait(PERIOD_SECONDS):
            now = time.monotonic()
            try:
                self._export(now - exported_at)
                is_failing = False
            except Exception:  # the next round makes up for it
                if not is_failing:
                    logger.exception(
                        "the metrics could not be brought up to date; trying again every %g s", PERIOD_SECONDS
                    )
                is_failing = True
            exported_at = now

    def _create(self) -> None:
        kinds = pb_utils.MetricFamily
        labels = self._source.labels
        for gauge in gauges():
            family = self._family(gauge.name, gauge.description, kinds.GAUGE)
            self._gauges.append(_Line(gauge, family.Metric(labels=labels | gauge.labels)))
        for counter in counters():
            family = self._family(counter.name, counter.description, kinds.COUNTER)
            self._counters.append(_Line(counter, family.Metric(labels=labels | counter.labels)))
        for histogram in histograms(self._source.max_model_len):
            family = self._family(histogram.name, histogram.description, kinds.HISTOGRAM)
            self._histograms.append(_Observer(histogram, family.Metric(labels=labels, buckets=list(histogram.buckets))))

    def _family(self, name: str, description: str, kind: Any) -> Any:
        if name not in self._families:
            self._families[name] = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        return self._families[name]

    def _export(self, seconds: float) -> None:
        """Send what is new; `seconds`: the time since the last call. Where it fails, this round's observations are lost."""
        records = self._source.recorder.take()
        self._num_lost += records.num_lost
        for observer in self._histograms:
            for value in observer.allowance.choose(observer.values(records), seconds):
                observer.metric.observe(value)
        num_dropped = self._num_lost + sum(observer.allowance.num_dropped for observer in self._histograms)
        stats = self._source.stats()
        refused = dict(self._refused)
        for reason, number in stats.refused_total.items():
            refused[reason.value] += number
        snapshot = Snapshot(stats, refused, num_dropped)
        for line in self._gauges:
            line.set(snapshot)
        for line in self._counters:
            line.increment(snapshot)
