"""The block manager's rules, one by one: misuse, growth and copy-on-write."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pagedcore._core import BlockManager
from tests.core.block_calls import BLOCK_SIZE, ids, start, take_copies, tokens_of

# --- construction and misuse


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_blocks": 0}, r"num_blocks must be in \[1, 536870911\], got 0"),
        ({"num_blocks": 2**29}, r"num_blocks must be in \[1, 536870911\], got 536870912"),
        ({"num_blocks": 2**40}, "num_blocks must be in"),
        ({"block_size": 0}, "block_size must be in"),
        ({"num_host_blocks": -1}, "num_host_blocks must be in"),
        ({"hash_bits": 0}, r"hash_bits must be in \[1, 64\], got 0"),
        ({"hash_bits": 65}, "hash_bits must be in"),
    ],
)
def test_refuses_impossible_sizes(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BlockManager(**{"num_blocks": 8, "block_size": BLOCK_SIZE, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda manager: manager.match_prefix(5, ids(1), 1, ""),
        lambda manager: manager.grow(5, 1, 0),
        lambda manager: manager.grow_many([5], [1], [0]),
        lambda manager: manager.fork(5, 6),
        lambda manager: manager.release(5),
        lambda manager: manager.commit(5, ids(1), 0),
        lambda manager: manager.swap_out([5]),
        lambda manager: manager.swap_in([5]),
        lambda manager: manager.block_table(5),
    ],
)
def test_an_unknown_sequence_is_a_key_error(manager: BlockManager, call: Callable[[BlockManager], object]) -> None:
    with pytest.raises(KeyError, match="no sequence 5"):
        call(manager)
    assert not manager.has(5)


def test_misuse_is_a_value_error_and_changes_nothing(manager: BlockManager) -> None:
    start(manager, 1, tokens_of(2))
    manager.add(2)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("sequence 1 was added before", lambda: manager.add(1)),
        ("sequence 2 was added before", lambda: manager.fork(1, 2)),
        ("sequence 1 has blocks", lambda: manager.match_prefix(1, tokens_of(2), 8, "")),
        ("max_tokens", lambda: manager.match_prefix(2, tokens_of(2), -1, "")),
        ("write_from", lambda: manager.grow(1, 3, 4)),
        ("write_from", lambda: manager.grow(1, 3, -1)),
        ("write_from", lambda: manager.grow_many([1], [0], [1])),
        ("num_tokens must have 1 elements, got 2", lambda: manager.grow_many([1], [3, 4], [2])),
        ("write_from must have 1 elements, got 0", lambda: manager.grow_many([1], [3], [])),
        ("num_computed", lambda: manager.commit(1, tokens_of(3), 9)),
        ("num_computed", lambda: manager.commit(1, tokens_of(3), -1)),
        ("sequence 1 is named twice", lambda: manager.swap_out([1, 1])),
        ("sequence 1 is not swapped out", lambda: manager.swap_in([1])),
    ]
    for text, call in cases:
        with pytest.raises(ValueError, match=text):
            call()
    assert manager.block_table(1) == [0, 1]
    assert manager.num_free_blocks == 6


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2, 3, 4],
        np.arange(4, dtype=np.int64),
        np.arange(4, dtype=np.float32),
        np.arange(4, dtype=np.uint32),
        np.arange(4, dtype=np.int32).reshape(2, 2),
        b"abcd",
    ],
)
def test_token_ids_must_be_int32(manager: BlockManager, tokens: object) -> None:
    manager.add(1)
    with pytest.raises(TypeError):
        manager.match_prefix(1, tokens, 4, "")  # type: ignore[arg-type]


def test_token_ids_may_be_any_int32_buffer_and_are_not_kept(manager: BlockManager) -> None:
    tokens = tokens_of(2)
    start(manager, 1, tokens)
    frozen = np.array(tokens, np.int32)
    frozen.flags.writeable = False
    manager.add(2)
    assert manager.match_prefix(2, frozen, 8, "") == 8
    manager.add(3)
    assert manager.match_prefix(3, memoryview(tokens), 8, "") == 8
    tokens.append(1)  # refused by Python while anyone holds a view
    with pytest.raises(ValueError, match="contiguous"):
        manager.commit(2, np.arange(16, dtype=np.int32)[::2], 8)


# --- growth


def test_blocks_needed_is_the_ceiling(manager: BlockManager) -> None:
    assert [manager.blocks_needed(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert manager.blocks_needed(2**63 - 1) == 2**61


def test_grow_is_all_or_nothing(manager: BlockManager) -> None:
    manager.add(1)
    assert not manager.grow(1, 8 * BLOCK_SIZE + 1, 0)
    assert (manager.block_table(1), manager.num_free_blocks) == ([], 8)
    assert manager.grow(1, 8 * BLOCK_SIZE, 0)
    assert not manager.grow(1, 8 * BLOCK_SIZE + 1, 8 * BLOCK_SIZE)
    assert manager.grow(1, 3, 0), "it has that room already"
    assert manager.num_free_blocks == 0


def test_grow_counts_the_copies_it_needs(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 6, 0)
    manager.fork(1, 2)
    manager.add(3)
    manager.grow(3, 5 * BLOCK_SIZE, 0)
    assert manager.num_free_blocks == 1
    assert not manager.grow(2, 9, 6), "a copy and a new block: one is missing"
    assert manager.block_table(2) == manager.block_table(1)
    assert take_copies(manager) == []
    assert manager.grow(2, 7, 6)
    assert manager.num_free_blocks == 0


def test_grow_many_stops_at_the_first_without_room(manager: BlockManager) -> None:
    for seq_id, num_tokens in ((1, 4), (2, 20), (3, 4)):
        manager.add(seq_id)
        manager.grow(seq_id, num_tokens, 0)
    assert manager.grow_many([1, 2, 3], [5, 21, 5], [4, 20, 4]) == 1
    assert [len(manager.block_table(seq_id)) for seq_id in (1, 2, 3)] == [2, 5, 1]
    assert manager.grow_many([1, 2, 3], [6, 20, 4], [5, 19, 3]) == 3


# --- copy-on-write


def test_forks_share_until_they_write_and_the_last_owner_writes_in_place(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 6, 0)
    manager.fork(1, 2)
    manager.fork(1, 3)
    assert manager.num_free_blocks == 6
    assert manager.grow_many([1, 2, 3], [7, 7, 7], [6, 6, 6]) == 3
    assert [manager.block_table(seq_id) for seq_id in (1, 2, 3)] == [[0, 2], [0, 3], [0, 1]]
    assert sorted(take_copies(manager)) == [(1, 2), (1, 3)]
    assert manager.num_free_blocks == 4


def test_the_last_owner_needs_no_room_while_a_copy_still_reads_its_block() -> None:
    manager = BlockManager(2, BLOCK_SIZE)
    manager.add(1)
    manager.grow(1, 2, 0)
    manager.fork(1, 2)
    assert manager.grow(2, 3, 2)
    assert manager.num_free_blocks == 0
    assert manager.grow(1, 3, 2)
    assert manager.block_table(1) == [0]


def test_only_blocks_that_are_written_are_copied(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 12, 0)
    manager.fork(1, 2)
    assert manager.grow(2, 9, 5)
    assert manager.block_table(2) == [0, 3, 4]
    assert manager.grow(1, 12, 12), "nothing is written"
    assert manager.block_table(1) == [0, 1, 2]
    assert sorted(take_copies(manager)) == [(1, 3), (2, 4)]


def test_a_copy_of_a_copy_reads_the_first_source(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 2, 0)
    manager.fork(1, 2)
    manager.grow(2, 3, 2)
    manager.fork(2, 3)
    manager.grow(3, 3, 2)
    assert sorted(take_copies(manager)) == [(0, 1), (0, 2)]


def test_a_source_is_held_until_it_is_read(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 2, 0)
    manager.fork(1, 2)
    manager.grow(2, 3, 2)
    manager.release(1)
    assert manager.num_free_blocks == 6
    manager.check_integrity()
    assert take_copies(manager) == [(0, 1)]
    assert manager.num_free_blocks == 7


def test_a_copy_nobody_wants_any_more_is_not_made(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 2, 0)
    for child in (2, 3, 4):
        manager.fork(1, child)
        manager.grow(child, 3, 2)
    manager.release(2)
    manager.check_integrity()
    assert sorted(take_copies(manager)) == [(0, 2), (0, 3)]
