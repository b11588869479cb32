"""Bounds how many observations are made."""

from __future__ import annotations

from collections.abc import Iterable

Observation = tuple[float, int]  # a value and how often it was seen


class Allowance:
    """Chooses observations: all of them, or evenly spaced ones where they are more than the rate for long.

    What is left out changes a histogram's count and sum, but neither its mean nor its quantiles.
    """

    def __init__(self, rate: float, burst: float) -> None:
        """`rate`: observations per second; `burst`: how many may be saved up."""
        self._rate = rate
        self._burst = burst
        self._saved = burst
        self._due = 0.0  # the part of the next observation that has come about
        self.num_dropped = 0

    def choose(self, observations: Iterable[Observation], seconds: float) -> list[float]:
        """The values to observe; `seconds`: the time since the last call."""
        observations = list(observations)
        self._saved = min(self._burst, self._saved + self._rate * seconds)
        total = sum(count for _, count in observations)
        share = 1.0 if total <= self._saved else self._saved / total
        chosen: list[float] = []
        for value, count in observations:
            self._due += count * share
            number = int(self._due)
            self._due -= number
            chosen += [value] * number
        self._saved = max(0.0, self._saved - len(chosen))
        self.num_dropped += total - len(chosen)
        return chosen
