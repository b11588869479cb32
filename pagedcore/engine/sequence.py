"""One token sequence and how far it has been computed."""

from __future__ import annotations

from array import array
from enum import Enum
from typing import TYPE_CHECKING

from pagedcore.engine.request import Request

if TYPE_CHECKING:
    from pagedcore.engine.logprobs import TokenLogprobs
    from pagedcore.engine.sequence_group import SequenceGroup

NEVER = 2**62  # a step that is never reached


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
    `index` is its number among the request's outputs. `slot` is its row in the table of sampling parameters while it runs.
    `last_row` is the row in the newest launched step that draws this sequence's next token; the next step takes its input
    id from there, without the host. Results of steps before `valid_from` are not its own any more: it has ended, or starts
    again after a failed step. A beam that `awaits_choice` has drawn in a launched step, and has no next token until the host has
    chosen. `cumulative_logprob` and `logprobs` are kept where the request wants or needs them.
    `token_at`: when the newest token reached the host, in seconds of `time.monotonic`; 0: there is none yet.
    """

    __slots__ = (
        "awaits_choice",
        "cumulative_logprob",
        "finish_reason",
        "group",
        "index",
        "last_row",
        "logprobs",
        "max_total_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_prompt_tokens",
        "request",
        "seed",
        "seq_id",
        "slot",
        "stop_token_ids",
        "token_at",
        "token_ids",
        "valid_from",
    )

    group: SequenceGroup

    def __init__(
        self,
        seq_id: int,
        request: Request,
        max_total_tokens: int,
        stop_token_ids: frozenset[int],
        seed: int,
        index: int = 0,
        token_ids: array[int] | None = None,
    ) -> None:
        """`token_ids`: the prompt and what has been output already; None: the prompt."""
        self.seq_id = seq_id
        self.request = request
        self.token_ids: array[int] = array("i", request.prompt_token_ids) if token_ids is None else token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_total_tokens = max_total_tokens
        self.stop_token_ids = stop_token_ids
        self.seed = seed
        self.index = index
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.last_row = -1
        self.slot = -1
        self.valid_from = 0
        self.awaits_choice = False
        self.token_at = 0.0
        self.cumulative_logprob = 0.0
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens the sequence has, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Sampled tokens the host knows."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The sampled tokens the host knows."""
        return self.token_ids[self.num_prompt_tokens :].tolist()

    def fork(self, seq_id: int, seed: int, index: int) -> Sequence:
        """Another sequence of the same request with the same tokens, computed as far, and a block table to be forked."""
        args = self.request, self.max_total_tokens, self.stop_token_ids
        child = Sequence(seq_id, *args, seed, index, self.token_ids[:])
        child.num_computed_tokens = self.num_computed_tokens
        child.token_at = self.token_at
        child.group = self.group
        return child

    def trunk(self, num_tokens: int) -> Sequence:
        """The first tokens of this sequence, to be computed in its block table; nothing that is drawn there counts."""
        args = self.request, self.max_total_tokens, self.stop_token_ids
        trunk = Sequence(self.seq_id, *args, self.seed, self.index, self.token_ids[:num_tokens])
        trunk.valid_from = NEVER
        trunk.slot = self.slot
        trunk.group = self.group
        return trunk
