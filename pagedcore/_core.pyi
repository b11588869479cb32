"""The block manager: which KV-cache block holds which part of which sequence (PagedAttention, Kwon et al. 2023, 4.2-4.5).

It decides and counts; it never touches K/V. Whoever owns the cache carries out its decisions in this order: the swaps in the
order of their calls, then the pending copies (independent of each other, so in any order or at once), then the step's writes.
Not thread-safe: one thread owns a manager.
"""

from array import array
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

TokenIds: TypeAlias = array[int] | memoryview | npt.NDArray[np.int32]

def copy_tokens(
    out: npt.NDArray[np.int32], token_ids: list[array[int]], starts: list[int], lengths: list[int], unknown: int
) -> int:
    """Write lengths[i] tokens of token_ids[i] from starts[i] on, for all i one behind the other, and return their number.

    `unknown` stands for those behind the end of token_ids[i]. Raises ValueError if `out` is too small or a value is negative.
    """

class BlockManager:
    """Block tables of all sequences over one pool of blocks, with reference counts, copy-on-write, prefix cache and swapping.

    "No room" is a return value and leaves everything as it was. A sequence id that was not added raises KeyError; other
    misuse raises ValueError and changes nothing. Token ids are one-dimensional contiguous int32 buffers (`array("i")`,
    numpy); other types raise TypeError.

    Which block is taken: a free one that holds nothing of use, else the least recently used cached one, which is evicted.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        enable_prefix_caching: bool = True,
        hash_bits: int = 64,
    ) -> None:
        """`block_size` in tokens; `num_host_blocks` for swapping; tests force collisions of the prefix hash by `hash_bits` < 64.

        Raises ValueError if num_blocks * block_size exceeds 2**31 - 1 (slots are int32) or a value is out of range.
        """

    def add(self, seq_id: int) -> None:
        """Start an empty block table. Raises ValueError if the id is in use."""

    def match_prefix(self, seq_id: int, token_ids: TokenIds, max_tokens: int, salt: str) -> int:
        """Attach the longest cached prefix of `token_ids`, in whole blocks, and return its length in tokens (<= max_tokens).

        Only before the sequence has blocks. A hit means that tokens, the whole prefix and `salt` are equal, never the hash
        alone. This call also enters the sequence into the prefix cache under `salt`: without it (max_tokens may be 0)
        commit registers nothing.
        """

    def grow(self, seq_id: int, num_tokens: int, write_from: int) -> bool:
        """Make room for `num_tokens` tokens and make every block with a slot in [write_from, num_tokens) the sequence's own.

        A block that other sequences share is replaced by a copy (a pending copy is recorded); one that is only registered in
        the prefix cache leaves it. False: no room, nothing changed. A sequence that rewrites committed blocks is not cached
        any further.
        """

    def grow_many(self, seq_ids: list[int], num_tokens: list[int], write_from: list[int]) -> int:
        """`grow` for each in order, up to the first without room; returns how many were grown."""

    def fork(self, parent: int, child: int) -> None:
        """Start `child` with all blocks of `parent`, shared (copy-on-write), of the host's if it is swapped out."""

    def release(self, seq_id: int) -> None:
        """Give the blocks back and forget the sequence. Cached ones stay findable until evicted, the last of a sequence first."""

    def commit(self, seq_id: int, token_ids: TokenIds, num_computed: int) -> None:
        """Register the blocks that are full of computed tokens: those below num_computed whose ids `token_ids` holds.

        Cheap when no further block has become full. A block whose prefix and tokens are cached already is not registered again.
        """

    def swap_out(self, seq_ids: list[int]) -> list[tuple[int, int]] | None:
        """Move sequences to host blocks: the (device, host) pairs to copy, before the next step. None: no room.

        A block that several of them share is moved once and stays shared among them. Blocks that others share are copied and
        stay theirs. Until swap_in, only has, fork and release accept the sequences.
        """

    def swap_in(self, seq_ids: list[int]) -> list[tuple[int, int]] | None:
        """Move swapped-out sequences back: the (device, host) pairs to copy, before the next step. None: no room."""

    def holding(self, seq_ids: list[int]) -> tuple[int, int]:
        """How many blocks these sequences hold between them, and how many of those nobody else holds."""

    def fill_step(
        self,
        buffer: npt.NDArray[np.int32],
        *,
        num_rows: int,
        num_tokens: int,
        table_width: int,
        seq_ids: list[int],
        num_computed: list[int],
        query_lens: list[int],
        token_ids: list[TokenIds],
        last_rows: list[int],
    ) -> int:
        """Write a step into its packed buffer (layout: step_plan.StepLayout) and return the offset behind the copies.

        `num_rows`, `num_tokens`: padded sizes; the lists hold the real rows. Row r computes tokens
        [num_computed[r], num_computed[r] + query_lens[r]); an id behind token_ids[r] (at most one) is written as
        -1 - last_rows[r]. A row with query_lens[r] == 0 has no context of its own, and its sequence need not be known: it draws
        from the last token of the row before it. Writes header, token ids, positions, slot mapping, query starts, lengths,
        block tables and the pending copies, which are then done with. Leaves the sampling section alone; in the header, extras
        and any_random are 0 and max_logprobs is -1.

        Raises ValueError, with the copies still pending, if the buffer or a padded size is too small, if a token is unknown,
        if the first row is without tokens, or if a slot to write is not the sequence's alone (grow makes it so).
        """

    def blocks_needed(self, num_tokens: int) -> int:
        """ceil(num_tokens / block_size)"""

    def block_table(self, seq_id: int) -> list[int]:
        """The sequence's blocks in order."""

    def has(self, seq_id: int) -> bool: ...
    def check_integrity(self) -> None:
        """Raise RuntimeError naming the first violated invariant. Walks everything: for tests and idle moments."""

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Live sequences go on, but nothing they compute is cached any more."""

    @property
    def max_blocks_per_sequence(self) -> int:
        """The most blocks that one sequence can have, alone in the pool."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken, cached ones without a sequence included."""

    @property
    def num_cached_blocks(self) -> int:
        """Blocks registered in the prefix cache, in use or not."""

    @property
    def num_evictions(self) -> int:
        """How often a cached block was taken for new contents; only ever grows."""

    @property
    def num_host_blocks(self) -> int: ...
    @property
    def num_free_host_blocks(self) -> int: ...

class ContiguousManager(BlockManager):
    """The memory policy that PagedAttention replaces (Kwon et al. 2023, 3.1, 6.1): block tables of consecutive blocks.

    The first `grow` of a sequence reserves by the buddy system, which rounds up to a power of two; a later one only looks
    whether that is enough. Nothing is shared, cached or swapped: `match_prefix` finds nothing, `fork` raises ValueError,
    `swap_out` has no room. `num_free_blocks` may be more than the longest free range: external fragmentation.
    `max_blocks_per_sequence` is the largest power of two in the pool.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Raises ValueError as BlockManager does."""
