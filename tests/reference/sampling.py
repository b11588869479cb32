"""Sampling in float64 with sorting and plain loops: what the kernels and the sampler are compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
UintArray = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@dataclass(frozen=True)
class Draw:
    """The sampling parameters of one row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    draw_index: int = 0
    num_logprobs: int = -1

    def pack(self) -> npt.NDArray[np.int32]:
        """The row of eight int32 that kernels/ops.h describes."""
        row = np.zeros(8, np.int32)
        row.view(np.float32)[[0, 2, 3]] = self.temperature, self.top_p, self.min_p
        row.view(np.uint32)[[4, 5]] = self.seed & 0xFFFFFFFF, self.seed >> 32
        row[[1, 6, 7]] = self.top_k, self.draw_index, self.num_logprobs
        return row


def philox(counter: tuple[UintArray | int, ...], key: tuple[int, int]) -> UintArray:
    """Philox4x32-10 of four counter words (arrays or ints) and two key words; returns [4, ...]."""
    x0, x1, x2, x3 = np.broadcast_arrays(*[np.asarray(word, np.uint64) for word in counter])
    k0, k1 = key
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * x0
        product1 = np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (
            (product1 >> _SHIFT) ^ x1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ x3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3])


def gumbel(vocab_size: int, draw: Draw) -> FloatArray:
    """The Gumbel variable of each vocabulary entry."""
    blocks = np.arange(-(-vocab_size // 4), dtype=np.uint64)
    words = philox((blocks, draw.draw_index, 0, 0), (draw.seed & 0xFFFFFFFF, draw.seed >> 32))
    u = ((words.T.reshape(-1)[:vocab_size] >> np.uint64(1)).astype(np.float64) + 0.5) / 2**31
    result: FloatArray = -np.log(-np.log1p(-u))
    return result


def kept(logits: npt.NDArray[np.float32], draw: Draw, slack: float = 0.0) -> npt.NDArray[np.bool_]:
    """Which entries top-k, then top-p, then min-p keep, by sorting. `slack` relaxes top-p and min-p by this much."""
    scaled = logits.astype(np.float64) / draw.temperature
    order = np.argsort(-scaled, kind="stable")
    keep = np.isfinite(scaled)
    if draw.top_k > 0:
        keep &= scaled >= scaled[order[min(draw.top_k, len(order)) - 1]]
    weights = np.where(keep, np.exp(scaled - scaled[order[0]]), 0.0)
    probabilities = weights / weights.sum()
    if draw.top_p < 1.0:
        before = np.concatenate([[0.0], np.cumsum(probabilities[order])[:-1]])
        last = int(np.flatnonzero(before < np.float32(draw.top_p) + slack)[-1])
        keep &= scaled >= scaled[order[last]]
    kept_by_min_p: npt.NDArray[np.bool_] = keep & (weights >= np.float32(draw.min_p) - slack)
    return kept_by_min_p


def probabilities(logits: npt.NDArray[np.float32], draw: Draw) -> FloatArray:
    """The distribution that a row's token is drawn from."""
    scaled = logits.astype(np.float64) / draw.temperature
    weights = np.where(kept(logits, draw), np.exp(scaled - scaled.max()), 0.0)
    result: FloatArray = weights / weights.sum()
    return result


def scores(logits: npt.NDArray[np.float32], draw: Draw) -> FloatArray:
    """What the drawn token is the argmax of."""
    scaled = logits.astype(np.float64) / draw.temperature
    noisy = scaled - scaled.max() + gumbel(len(logits), draw)
    return np.where(kept(logits, draw), noisy, -np.inf)


def log_softmax(logits: npt.NDArray[np.float32]) -> FloatArray:
    values = logits.astype(np.float64)
    result: FloatArray = values - values.max() - np.log(np.exp(values - values.max()).sum())
    return result


def penalize(
    logits: npt.NDArray[np.float32],
    prompt: Iterable[int],
    output: list[int],
    repetition: float,
    presence: float,
    frequency: float,
) -> FloatArray:
    """Penalties as vLLM defines them: repetition over prompt and output, the others over the output."""
    values = logits.astype(np.float64)
    for token in set(prompt) | set(output):
        values[token] = values[token] / repetition if values[token] > 0 else values[token] * repetition
    for token in set(output):
        values[token] -= presence + frequency * output.count(token)
    return values
