"""Prefixes that the operator declared: computed once and kept in the pool for good (Kwon et al. 2023, section 4.4)."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from pagedcore._core import BlockManager
from pagedcore.engine.request import Request
from pagedcore.engine.sequence import Sequence


@dataclass(frozen=True)
class _PinnedPrefix:
    token_ids: array[int]
    seq_id: int  # of the block table that holds it


class PinnedPrefixes:
    """Owns a block table for each declared prefix, which is never evicted.

    Unlike the prefix cache, which shares whole blocks, a pinned prefix is shared to its last token: its last, partial block
    is copied when a sequence writes behind the prefix. Only sequences without a cache salt begin with one, and none whose
    request wants to know how likely its prompt was, which has to be computed for that.
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
        prefix = self._longest(sequence.request, sequence.token_ids)
        if prefix is None or len(prefix.token_ids) <= num_cached:
            return num_cached
        self._blocks.release(sequence.seq_id)
        self._blocks.fork(prefix.seq_id, sequence.seq_id)
        return len(prefix.token_ids)

    def num_shared_blocks(self, request: Request) -> int:
        """How many of the pinned blocks the request's sequences never need a copy of: the full ones of its prefix."""
        prefix = self._longest(request, array("i", request.prompt_token_ids)) if self._prefixes else None
        return 0 if prefix is None else len(prefix.token_ids) // self._blocks.block_size

    def _longest(self, request: Request, token_ids: array[int]) -> _PinnedPrefix | None:
        """The longest prefix of these tokens of a request, the last one left out; None if it shares none."""
        if request.cache_salt or request.sampling_params.prompt_logprobs is not None:
            return None
        for prefix in self._prefixes:
            length = len(prefix.token_ids)
            if length < len(token_ids) and token_ids[:length] == prefix.token_ids:
                return prefix
        return None
