"""How much KV-cache memory a sequence takes when it is admitted: PagedAttention, or one of the paper's baselines."""

from __future__ import annotations

from dataclasses import dataclass

from pagedcore._core import BlockManager, ContiguousManager
from pagedcore.config import KV_POLICIES
from pagedcore.engine.sequence import Sequence


@dataclass(frozen=True)
class MemoryPolicy:
    """One of KV_POLICIES (Kwon et al. 2023, section 6.1), as questions that the scheduler asks.

    paged: blocks for the tokens a sequence has; it grows as it is computed, and may be preempted.
    The others reserve contiguous memory once, for prompt and output, and never need more:
    orca_oracle: the output's true length; orca_pow2: that, rounded up to a power of two; orca_max: `max_model_len` in all.
    static_batch: as orca_max, and a batch runs to its end before the next one starts (FasterTransformer).

    The true length is `Request.expected_output_len`. Where nobody knows it, or a sequence has gone beyond it, its bound
    `max_total_tokens` takes its place.
    """

    name: str = "paged"
    max_model_len: int = 0  # what orca_max and static_batch reserve

    def __post_init__(self) -> None:
        assert self.name in KV_POLICIES

    @property
    def is_paged(self) -> bool:
        return self.name == "paged"

    @property
    def reserves_max_model_len(self) -> bool:
        return self.name in ("orca_max", "static_batch")

    def make_blocks(
        self, num_blocks: int, block_size: int, *, num_host_blocks: int = 0, enable_prefix_caching: bool = True
    ) -> BlockManager:
        """The manager that carries the policy out. Only `paged` has a use for host blocks and cached prefixes."""
        if not self.is_paged:
            return ContiguousManager(num_blocks, block_size)
        return BlockManager(
            num_blocks, block_size, num_host_blocks=num_host_blocks, enable_prefix_caching=enable_prefix_caching
        )

    def may_admit(self, num_running: int) -> bool:
        """Whether sequences may join those that are running at the start of a step."""
        return self.name != "static_batch" or num_running == 0

    def tokens_to_hold(self, sequence: Sequence) -> int:
        """The tokens a sequence must have room for when it is admitted."""
        if self.is_paged:
            return len(sequence.token_ids)
        if self.reserves_max_model_len:
            return self.max_model_len
        output_len = sequence.request.expected_output_len
        if output_len is None or sequence.num_output_tokens >= output_len:
            return sequence.max_total_tokens
        if self.name == "orca_pow2":
            output_len = 1 << (output_len - 1).bit_length()
        return min(sequence.num_prompt_tokens + output_len, sequence.max_total_tokens)

    def most_tokens(self, max_total_tokens: int) -> int:
        """The most tokens a sequence of so many, prompt and output, may ever have to have room for."""
        if self.is_paged:
            return max_total_tokens - 1  # the last token drawn is never written
        return self.max_model_len if self.reserves_max_model_len else max_total_tokens


PAGED = MemoryPolicy()
