"""One token sequence and how far it has been computed."""

from __future__ import annotations

from array import array
from enum import Enum

from pagedcore.engine.request import Request


class SequenceStatus(Enum):
    """Where a sequence is. Only RUNNING ones own blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a sequence ended; the values are vLLM's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Sequence:
    """Tokens and progress counters of one sequence; its block table lives in the block manager under `seq_id`.

    `token_ids` holds the prompt, then the sampled tokens the host knows. `num_in_flight` more have been sampled by launched
    steps whose results the host has not read (0 or 1, since the engine runs one step ahead).
    `num_computed_tokens` counts the tokens whose K/V a launched step has written or will have written when it is done.
    `max_total_tokens` bounds prompt and output together; any of `stop_token_ids` ends the sequence; `seed` keys its draws.
    `slot` is its row in the scheduler's table of sampling parameters while it runs. `last_row` is the row in the newest
    launched step that draws this sequence's next token; the next step takes its input id from there, without the host.
    """

    __slots__ = (
        "finish_reason",
        "last_row",
        "max_total_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_prompt_tokens",
        "request",
        "seed",
        "seq_id",
        "slot",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self, seq_id: int, request: Request, max_total_tokens: int, stop_token_ids: frozenset[int], seed: int
    ) -> None:
        self.seq_id = seq_id
        self.request = request
        self.token_ids: array[int] = array("i", request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_total_tokens = max_total_tokens
        self.stop_token_ids = stop_token_ids
        self.seed = seed
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_in_flight = 0
        self.last_row = -1
        self.slot = -1
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens the sequence has, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Sampled tokens the host knows."""
        return len(self.token_ids) - self.num_prompt_tokens
