"""Reads the metrics endpoint."""

from __future__ import annotations

import re
import time

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import MODEL, TIMEOUT, metrics_text, wait_until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]  # by name and labels

SETTLE_SECONDS = 0.3  # metrics are exported ten times a second
OWN_LABELS = frozenset({("model", MODEL), ("version", "1")})


def parse(text: str) -> Samples:
    samples: Samples = {}
    for name, labels, value in re.findall(r"^([\w:]+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
        samples[name, frozenset(re.findall(r'(\w+)="([^"]*)"', labels))] = float(value)
    return samples


def settled(url: str) -> Samples:
    """The samples when all requests that have been answered are counted: nothing changes any more. None may be running."""
    deadline = time.monotonic() + TIMEOUT
    before: Samples = {}
    while _own(now := parse(metrics_text(url))) != _own(before):
        assert time.monotonic() < deadline, "the metrics go on changing"
        before = now
        time.sleep(SETTLE_SECONDS)
    return now


def _own(samples: Samples) -> Samples:
    return {key: value for key, value in samples.items() if key[0].startswith(("vllm:", "pagedcore:"))}


class Growth:
    """How much counters and histograms have grown since this was made, which waits for what was answered before."""

    def __init__(self, server: TritonServer) -> None:
        self._url = server.metrics_url
        self._before = settled(self._url)

    def of(self, name: str, **labels: str) -> float:
        key = name, OWN_LABELS | frozenset(labels.items())
        return parse(metrics_text(self._url))[key] - self._before[key]

    def wait_for(self, name: str, amount: float, **labels: str) -> None:
        wait_until(lambda: self.of(name, **labels) >= amount)
        assert self.of(name, **labels) == amount
