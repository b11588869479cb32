"""What the engine hands back, one message per sequence and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pagedcore.engine.sequence import FinishReason


class TokenLogprobs(NamedTuple):
    """Log probabilities at one output position, of the model's unmodified distribution."""

    logprob: float
    rank: int  # of the sampled token; 1: most likely
    top: list[tuple[int, float]]  # (token id, log probability), descending


@dataclass(slots=True)
class TokenOutput:
    """New tokens of one sequence of a request, in order; the last message of a sequence has a finish reason.

    `stop_reason` is the stop token id that ended it, when that is not the end-of-sequence token.
    `logprobs` has one entry per token, when the request asked for them. `error` is set exactly when the reason is ERROR.
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    error: Exception | None = None


class OutputSink(Protocol):
    """Where a request's outputs go. Called on the engine thread: must return at once."""

    def push(self, output: TokenOutput) -> None: ...


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine between two steps; `*_total` only ever grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    prefix_cache_queries_total: int = 0  # tokens
    prefix_cache_hits_total: int = 0  # tokens
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    steps_total: int = 0
