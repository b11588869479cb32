"""The time of a step as measured on a device, between and beyond the steps that were measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MeasuredStep:
    """A step that computed `num_tokens` tokens and attended to `num_context_tokens`, and how long it took (seconds)."""

    num_tokens: int
    num_context_tokens: int
    seconds: float


class MeasuredStepTime:
    """base(tokens computed) + per_context_token * tokens attended to.

    per_context_token is fitted to steps of equal numbers of tokens and different contexts; base is the mean of what is left,
    linear between the measured numbers of tokens and behind the last two.
    """

    def __init__(self, steps: list[MeasuredStep]) -> None:
        by_tokens: dict[int, list[MeasuredStep]] = {}
        for step in steps:
            by_tokens.setdefault(step.num_tokens, []).append(step)
        context, seconds = [], []
        for group in by_tokens.values():
            mean_context = np.mean([step.num_context_tokens for step in group])
            mean_seconds = np.mean([step.seconds for step in group])
            context += [step.num_context_tokens - mean_context for step in group]
            seconds += [step.seconds - mean_seconds for step in group]
        spread = float(np.dot(context, context))
        self.per_context_token = max(float(np.dot(context, seconds)) / spread, 0.0) if spread else 0.0
        self._sizes = sorted(by_tokens)
        self._base = [
            float(
                np.mean([step.seconds - self.per_context_token * step.num_context_tokens for step in by_tokens[size]])
            )
            for size in self._sizes
        ]

    def seconds(self, num_tokens: int, num_context_tokens: int) -> float:
        """For any step, in seconds."""
        sizes, base = self._sizes, self._base
        if num_tokens > sizes[-1] and len(sizes) > 1:
            slope = (base[-1] - base[-2]) / (sizes[-1] - sizes[-2])
            own = base[-1] + slope * (num_tokens - sizes[-1])
        else:
            own = float(np.interp(num_tokens, sizes, base))
        return own + self.per_context_token * num_context_tokens
