"""Reads the metrics endpoint."""

from __future__ import annotations

import re

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import MODEL, metrics_text, wait_until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]  # by name and labels

OWN_LABELS = frozenset({("model", MODEL), ("version", "1")})


def parse(text: str) -> Samples:
    samples: Samples = {}
    for name, labels, value in re.findall(r"^([\w:]+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
        samples[name, frozenset(re.findall(r'(\w+)="([^"]*)"', labels))] = float(value)
    return samples


class Growth:
    """How much counters and histograms have grown since this was made."""

    def __init__(self, server: TritonServer) -> None:
        self._url = server.metrics_url
        self._before = parse(metrics_text(self._url))

    def of(self, name: str, **labels: str) -> float:
        key = name, OWN_LABELS | frozenset(labels.items())
        return parse(metrics_text(self._url))[key] - self._before[key]

    def wait_for(self, name: str, amount: float, **labels: str) -> None:
        wait_until(lambda: self.of(name, **labels) >= amount)
        assert self.of(name, **labels) == amount
