"""The block manager's rules, one by one: the prefix cache and eviction from it."""

from __future__ import annotations

import itertools
from array import array

import pytest

from pagedcore._core import BlockManager
from tests.core.block_calls import BLOCK_SIZE, cached_tokens, ids, start, take_copies, tokens_of

# --- prefix cache


def test_a_prefix_is_found_in_whole_blocks_up_to_the_limit(manager: BlockManager) -> None:
    tokens = tokens_of(3)
    start(manager, 1, tokens[:10])
    assert cached_tokens(manager, tokens) == 8, "the third block was not full"
    assert cached_tokens(manager, tokens[:7]) == 4
    assert cached_tokens(manager, ids(9, 9, 9, 9) + tokens[4:8]) == 0, "same block, other prefix"
    manager.add(2)
    assert manager.match_prefix(2, tokens, 7, "") == 4
    assert manager.block_table(2) == manager.block_table(1)[:1]


def test_blocks_are_registered_once_they_are_computed_and_their_tokens_known(manager: BlockManager) -> None:
    tokens = tokens_of(2)
    manager.add(1)
    manager.match_prefix(1, tokens, 0, "")
    manager.grow(1, 8, 0)
    for num_known, num_computed, expected in ((8, 3, 0), (8, 4, 4), (7, 8, 4), (8, 8, 8)):
        manager.commit(1, tokens[:num_known], num_computed)
        assert cached_tokens(manager, tokens) == expected


def test_salts_keep_prefixes_apart(manager: BlockManager) -> None:
    tokens = tokens_of(1)
    start(manager, 1, tokens, salt="red")
    assert cached_tokens(manager, tokens) == 0
    assert cached_tokens(manager, tokens, salt="blue") == 0
    assert cached_tokens(manager, tokens, salt="red") == 4
    manager.release(1)
    assert cached_tokens(manager, tokens, salt="red") == 4, "the cached block remembers its salt"


def test_a_salt_that_was_forgotten_and_comes_back_starts_anew() -> None:
    manager = BlockManager(1, BLOCK_SIZE)
    start(manager, 1, tokens_of(1), salt="red")
    manager.release(1)
    manager.add(2)
    manager.grow(2, 4, 0)
    manager.check_integrity()  # nobody remembers the salt
    manager.release(2)
    assert cached_tokens(manager, tokens_of(1), salt="red") == 0
    assert start(manager, 3, tokens_of(1), salt="red") == 0


def test_without_match_prefix_nothing_is_registered(manager: BlockManager) -> None:
    manager.add(1)
    manager.grow(1, 4, 0)
    manager.commit(1, tokens_of(1), 4)
    assert manager.num_cached_blocks == 0


def test_prefix_caching_can_be_off() -> None:
    manager = BlockManager(8, BLOCK_SIZE, enable_prefix_caching=False)
    start(manager, 1, tokens_of(2))
    assert cached_tokens(manager, tokens_of(2)) == 0
    assert manager.num_cached_blocks == 0
    manager.check_integrity()


@pytest.mark.parametrize("hash_bits", [1, 2, 64])
def test_every_prefix_is_found_whatever_the_hash_does(hash_bits: int) -> None:
    manager = BlockManager(200, 2, hash_bits=hash_bits)
    strings = [array("i", string) for string in itertools.product((0, 1), repeat=6)]
    for seq_id, string in enumerate(strings):
        start(manager, seq_id, string)
    assert manager.num_cached_blocks == 4 + 16 + 64
    tables = {tuple(string): manager.block_table(seq_id) for seq_id, string in enumerate(strings)}
    for seq_id, string in enumerate(strings, start=1000):
        manager.add(seq_id)
        assert manager.match_prefix(seq_id, string, 6, "") == 6
        assert manager.block_table(seq_id) == tables[tuple(string)]
    manager.check_integrity()


def test_equal_contents_are_registered_once_and_the_chain_goes_on(manager: BlockManager) -> None:
    tokens = tokens_of(2)
    for seq_id in (1, 2):
        manager.add(seq_id)
        manager.match_prefix(seq_id, tokens, 0, "")
        manager.grow(seq_id, 8, 0)
    manager.commit(1, tokens[:4], 4)
    manager.commit(2, tokens, 8)
    assert manager.num_cached_blocks == 2
    manager.add(3)
    assert manager.match_prefix(3, tokens, 8, "") == 8
    assert manager.block_table(3) == [manager.block_table(1)[0], manager.block_table(2)[1]]


def test_a_block_behind_an_evicted_prefix_is_not_found_under_its_successor() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    tokens = tokens_of(2)
    for seq_id in (1, 2):
        manager.add(seq_id)
        manager.match_prefix(seq_id, tokens, 0, "")
    manager.grow(1, 4, 0)
    manager.grow(2, 8, 0)
    manager.commit(1, tokens, 4)
    manager.commit(2, tokens, 8)  # its second block hangs on the first of sequence 1
    manager.release(1)
    manager.add(3)
    assert manager.grow(3, 8, 0)
    assert manager.num_evictions == 1
    assert cached_tokens(manager, tokens) == 0
    manager.release(3)
    assert start(manager, 4, tokens[:4]) == 0
    assert cached_tokens(manager, tokens) == 4, "the second block's parent was another entry, if with the same tokens"
    manager.check_integrity()


def test_nothing_is_registered_behind_an_evicted_prefix() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    tokens = tokens_of(2)
    for seq_id in (1, 2):
        manager.add(seq_id)
        manager.match_prefix(seq_id, tokens, 0, "")
        manager.grow(seq_id, 4, 0)
        manager.commit(seq_id, tokens, 4)
    manager.release(1)
    manager.add(3)
    manager.grow(3, 12, 0)
    manager.release(3)
    manager.grow(2, 8, 4)
    manager.commit(2, tokens, 8)
    assert manager.num_cached_blocks == 0


def test_nothing_is_registered_behind_a_prefix_that_was_evicted_while_swapped_out() -> None:
    manager = BlockManager(4, BLOCK_SIZE, num_host_blocks=1)
    tokens = tokens_of(2)
    start(manager, 1, tokens[:4])
    manager.release(1)
    assert start(manager, 2, tokens[:4]) == 4
    manager.swap_out([2])
    manager.add(3)
    manager.grow(3, 16, 0)
    manager.release(3)
    manager.swap_in([2])
    manager.grow(2, 8, 4)
    manager.commit(2, tokens, 8)
    assert manager.num_cached_blocks == 0


def test_a_cached_block_that_is_rewritten_leaves_the_cache(manager: BlockManager) -> None:
    tokens = tokens_of(3)
    start(manager, 1, tokens)
    assert manager.grow(1, 7, 6)
    assert manager.block_table(1) == [0, 1, 2]
    assert take_copies(manager) == []
    assert cached_tokens(manager, tokens) == 4
    manager.commit(1, tokens_of(3, first=100), 12)
    assert cached_tokens(manager, tokens) == 4, "what is behind a rewritten block is not registered"
    assert cached_tokens(manager, tokens_of(3, first=100)) == 0


def test_what_follows_a_rewritten_block_is_not_taken_for_what_followed_the_old_one(manager: BlockManager) -> None:
    old, new = tokens_of(2), ids(0, 1, 99, 99) + tokens_of(1, first=4)
    for seq_id in (1, 2):
        manager.add(seq_id)
        manager.match_prefix(seq_id, old, 0, "")
        manager.grow(seq_id, 4, 0)
        manager.commit(seq_id, old, 4)
    manager.grow(2, 8, 2)
    manager.commit(2, new, 8)
    assert cached_tokens(manager, old) == 4
    assert cached_tokens(manager, new) == 0


def test_a_block_whose_copy_is_cancelled_is_not_cached(manager: BlockManager) -> None:
    tokens = tokens_of(1)
    manager.add(1)
    manager.match_prefix(1, tokens, 0, "")
    manager.grow(1, 4, 0)
    manager.fork(1, 2)
    manager.grow(2, 4, 3)
    manager.commit(2, tokens, 4)
    manager.release(2)
    assert cached_tokens(manager, tokens) == 0


def test_a_shared_cached_block_stays_cached_when_a_fork_writes(manager: BlockManager) -> None:
    tokens = tokens_of(1)
    start(manager, 1, tokens)
    manager.fork(1, 2)
    assert manager.grow(2, 4, 3)
    assert manager.block_table(2) != manager.block_table(1)
    assert cached_tokens(manager, tokens) == 4


def test_committing_other_tokens_for_a_shared_block_is_refused(manager: BlockManager) -> None:
    manager.add(1)
    manager.match_prefix(1, ids(), 0, "")
    manager.grow(1, 4, 0)
    manager.fork(1, 2)
    manager.commit(1, tokens_of(1), 4)
    with pytest.raises(ValueError, match="shared block"):
        manager.commit(2, tokens_of(1, first=50), 4)


def test_a_refused_commit_changes_nothing(manager: BlockManager) -> None:
    tokens = tokens_of(2)
    manager.add(1)
    manager.match_prefix(1, ids(), 0, "")
    manager.grow(1, 8, 0)
    manager.fork(1, 2)
    assert manager.grow(2, 4, 0), "the first block becomes its own, the second one stays shared"
    manager.commit(1, tokens, 8)
    with pytest.raises(ValueError, match="shared block"):
        manager.commit(2, tokens_of(2, first=50), 8)
    assert manager.num_cached_blocks == 2
    assert cached_tokens(manager, tokens_of(2, first=50)) == 0


def test_reset_forgets_everything_and_nothing_old_comes_back(manager: BlockManager) -> None:
    tokens = tokens_of(3)
    start(manager, 1, tokens[:8])
    start(manager, 2, tokens_of(1, first=50))
    manager.release(2)
    manager.add(5)
    manager.match_prefix(5, tokens, 0, "")
    manager.grow(5, 4, 0)
    manager.reset_prefix_cache()
    assert manager.num_cached_blocks == 0
    manager.grow(1, 12, 8)
    manager.commit(1, tokens, 12)
    manager.commit(5, tokens, 4)
    manager.add(3)
    assert manager.match_prefix(3, tokens, 12, "") == 0
    assert manager.num_cached_blocks == 0, "computed before the reset, or on top of that"
    assert start(manager, 4, tokens_of(1, first=50)) == 0
    assert cached_tokens(manager, tokens_of(1, first=50)) == 4


# --- eviction


def test_blocks_that_hold_nothing_are_taken_before_cached_ones(manager: BlockManager) -> None:
    start(manager, 1, tokens_of(2))
    manager.release(1)
    assert manager.num_free_blocks == 8
    manager.add(2)
    manager.grow(2, 6 * BLOCK_SIZE, 0)
    assert cached_tokens(manager, tokens_of(2)) == 8
    assert manager.num_evictions == 0
    manager.grow(2, 6 * BLOCK_SIZE + 1, 6 * BLOCK_SIZE)
    assert cached_tokens(manager, tokens_of(2)) == 4, "the tail goes first"
    assert manager.num_evictions == 1


def test_the_least_recently_used_prefix_is_evicted_first(manager: BlockManager) -> None:
    prompts = [tokens_of(2, first=100 * i) for i in range(4)]
    for seq_id, prompt in enumerate(prompts):
        start(manager, seq_id, prompt)
    for seq_id in (1, 0, 3, 2):
        manager.release(seq_id)
    assert cached_tokens(manager, prompts[1]) == 8, "a hit makes it the most recently used"
    manager.add(9)
    manager.grow(9, 3 * BLOCK_SIZE, 0)
    manager.release(9)
    assert [cached_tokens(manager, prompt) for prompt in prompts] == [0, 8, 8, 4]


def test_a_fork_does_not_register_again_what_hangs_on_an_evicted_prefix(manager: BlockManager) -> None:
    tokens = tokens_of(8)
    for seq_id in (1, 2):
        manager.add(seq_id)
        manager.match_prefix(seq_id, tokens, 8, "")
        manager.grow(seq_id, 8, 0)
    manager.fork(2, 3)
    manager.commit(1, tokens, 4)
    manager.commit(2, tokens, 8)  # its second block hangs on the first one of sequence 1
    manager.release(1)
    manager.add(4)
    manager.grow(4, 24, 0)
    assert manager.num_evictions == 1
    manager.commit(3, tokens, 8)
    manager.check_integrity()
    assert manager.num_cached_blocks == 2
    manager.release(4)
    manager.add(5)
    assert manager.match_prefix(5, tokens, 8, "") == 4
