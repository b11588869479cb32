"""The block manager's rules, one by one: swapping to the host and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pagedcore._core import BlockManager
from tests.core.block_calls import BLOCK_SIZE, cached_tokens, start, take_copies, tokens_of


def test_a_swapped_out_sequence_has_no_blocks_to_work_on(manager: BlockManager) -> None:
    start(manager, 1, tokens_of(1))
    manager.swap_out([1])
    calls: list[Callable[[], object]] = [
        lambda: manager.grow(1, 5, 4),
        lambda: manager.holding([1]),
        lambda: manager.commit(1, tokens_of(1), 4),
        lambda: manager.match_prefix(1, tokens_of(1), 4, ""),
        lambda: manager.swap_out([1]),
        lambda: manager.block_table(1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="sequence 1 is swapped out"):
            call()
    assert manager.has(1)


def test_a_swapped_out_sequence_forks_on_the_host(manager: BlockManager) -> None:
    start(manager, 1, tokens_of(1))
    manager.swap_out([1])
    free = manager.num_free_host_blocks
    manager.fork(1, 2)
    assert manager.num_free_host_blocks == free
    manager.check_integrity()
    manager.release(1)
    assert manager.num_free_host_blocks == free
    assert manager.swap_in([2]) is not None
    assert (len(manager.block_table(2)), manager.num_free_host_blocks) == (4 - free, 4)


def test_a_sequence_goes_to_the_host_and_comes_back(manager: BlockManager) -> None:
    tokens = tokens_of(3)
    start(manager, 1, tokens[:9])
    assert manager.swap_out([1]) == [(0, 0), (1, 1), (2, 2)]
    assert (manager.num_free_blocks, manager.num_free_host_blocks) == (8, 1)
    assert cached_tokens(manager, tokens) == 8, "its cached blocks can still be found on the device"
    pairs = manager.swap_in([1])
    assert pairs is not None and [host for _, host in pairs] == [0, 1, 2]
    assert manager.block_table(1) == [device for device, _ in pairs]
    assert (manager.num_free_blocks, manager.num_free_host_blocks) == (5, 4)
    manager.grow(1, 12, 9)
    manager.commit(1, tokens, 12)
    assert cached_tokens(manager, tokens) == 12, "it goes on where its cached prefix ends"


def test_swapping_is_all_or_nothing(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 5 * BLOCK_SIZE, 0)
    assert manager.swap_out([1]) is None
    assert (len(manager.block_table(1)), manager.num_free_host_blocks) == (5, 4)
    manager.add(2)
    manager.grow(2, 2 * BLOCK_SIZE, 0)
    assert manager.swap_out([2]) is not None
    manager.grow(1, 7 * BLOCK_SIZE, 0)
    assert manager.swap_in([2]) is None
    assert (manager.num_free_blocks, manager.num_free_host_blocks) == (1, 2)
    manager.release(2)
    assert manager.num_free_host_blocks == 4
    manager.add(3)
    assert manager.swap_out([3]) == [] and manager.swap_in([3]) == []


def test_a_shared_block_is_swapped_for_one_and_stays_for_the_other(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 6, 0)
    manager.fork(1, 2)
    assert manager.swap_out([1]) == [(0, 0), (1, 1)]
    assert manager.block_table(2) == [0, 1]
    assert manager.grow(2, 7, 6) and take_copies(manager) == [], "it is the only owner now"
    assert manager.swap_out([2]) == [(0, 2), (1, 3)]
    assert manager.num_free_blocks == 8


def test_sequences_that_are_swapped_together_share_on_the_host_and_again_on_the_device(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 6, 0)
    manager.fork(1, 2)
    manager.grow(2, 7, 6)
    assert take_copies(manager) == [(1, 2)]
    assert manager.holding([1]) == (2, 1) and manager.holding([1, 2]) == (3, 3)
    assert manager.swap_out([1, 2]) == [(0, 0), (1, 1), (2, 2)]
    assert (manager.num_free_blocks, manager.num_free_host_blocks) == (8, manager.num_host_blocks - 3)
    pairs = manager.swap_in([1, 2])
    assert pairs is not None and [host for _, host in pairs] == [0, 1, 2]
    first, second = manager.block_table(1), manager.block_table(2)
    assert first[0] == second[0] and first[1] != second[1]
    manager.release(1)
    assert (manager.num_free_blocks, manager.num_free_host_blocks) == (6, manager.num_host_blocks)
    manager.check_integrity()


def test_a_block_that_waits_for_its_copy_is_swapped_from_the_source(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 2, 0)
    manager.fork(1, 2)
    manager.grow(2, 3, 2)
    assert manager.block_table(2) == [1]
    assert manager.swap_out([2]) == [(0, 0)]
    assert take_copies(manager) == []
