"""Short ways to bring a block manager into a state and to look at it."""

from __future__ import annotations

from array import array

import numpy as np

from pagedcore._core import BlockManager

BLOCK_SIZE = 4


def ids(*values: int) -> array[int]:
    return array("i", values)


def tokens_of(num_blocks: int, first: int = 0) -> array[int]:
    """Tokens that fill `num_blocks` blocks, no two alike."""
    return array("i", range(first, first + num_blocks * BLOCK_SIZE))


def start(manager: BlockManager, seq_id: int, tokens: array[int], salt: str = "", max_tokens: int | None = None) -> int:
    """Add a sequence, attach what is cached of it, compute the rest and commit. Returns the number of cached tokens."""
    manager.add(seq_id)
    num_cached = manager.match_prefix(seq_id, tokens, len(tokens) if max_tokens is None else max_tokens, salt)
    assert manager.grow(seq_id, len(tokens), num_cached)
    manager.commit(seq_id, tokens, len(tokens))
    return num_cached


def cached_tokens(manager: BlockManager, tokens: array[int], salt: str = "") -> int:
    """How much of `tokens` is in the prefix cache. Changes the order of eviction like any other use."""
    manager.add(-1)
    num_cached = manager.match_prefix(-1, tokens, len(tokens), salt)
    manager.release(-1)
    return num_cached


def take_copies(manager: BlockManager) -> list[tuple[int, int]]:
    """The pending copies, which are then done with."""
    buffer = np.zeros(200, np.int32)
    end = manager.fill_step(
        buffer,
        num_rows=0,
        num_tokens=0,
        table_width=0,
        seq_ids=[],
        num_computed=[],
        query_lens=[],
        token_ids=[],
        last_rows=[],
    )
    return [(int(source), int(target)) for source, target in buffer[17:end].reshape(-1, 2)]
