"""Prefixes that the operator declared: computed once and kept in the pool for good (Kwon et al. 2023, section 4.4)."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from pagedcore._core import BlockManager
from pagedcore.engine.sequence import Sequence


@dataclass(frozen=True)
class _PinnedPrefix:
    token_ids: array[int]
    seq_id: int  # of the block table that holds it


class PinnedPrefixes:
    """Owns a block table for each declared prefix, which is never evicted.

    Unlike the prefix cache, which shares whole blocks, a pinned prefix is shared to its last token: its last, partial block
    is copied when a sequence writes behind the prefix. Only sequences without a cache salt begin with one.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self.num_blocks = 0  # those that are held, each counted once
        self._blocks = blocks
        self._prefixes: list[_PinnedPrefix] = []  # longest first

    def pin(self, sequence: Sequence, seq_id: int) -> None:
        """Keep the blocks of a sequence, as they will be when the launched steps are done, under a new sequence id."""
        self._blocks.fork(sequence.seq_id, seq_id)
        self._prefixes.append(_PinnedPrefix(sequence.token_ids[:], seq_id))
        self._prefixes.sort(key=lambda prefix: -len(prefix.token_ids))
        self.num_blocks, _ = self._blocks.holding([prefix.seq_id for prefix in self._prefixes])

    def attach(self, sequence: Sequence, num_cached: int) -> int:
        """Let a sequence begin with the longest pinned prefix of its tokens, if that is longer than the cached one it has.

        Returns how many tokens it then begins with; the last one is always left to compute.
        """
        if sequence.request.cache_salt:
            return num_cached
        for prefix in self._prefixes:
            length = len(prefix.token_ids)
            if length <= num_cached:
                break
            if length < len(sequence.token_ids) and sequence.token_ids[:length] == prefix.token_ids:
                self._blocks.release(sequence.seq_id)
                self._blocks.fork(prefix.seq_id, sequence.seq_id)
                return length
        return num_cached
