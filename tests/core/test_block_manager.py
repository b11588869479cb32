"""The block manager's rules, one by one."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pagedcore._core import BlockManager

BLOCK_SIZE = 4


def ids(*values: int) -> array[int]:
    return array("i", values)


def tokens_of(num_blocks: int, first: int = 0) -> array[int]:
    """Tokens that fill `num_blocks` blocks, no two alike."""
    return array("i", range(first, first + num_blocks * BLOCK_SIZE))


@pytest.fixture
def manager() -> Iterator[BlockManager]:
    manager = BlockManager(8, BLOCK_SIZE, num_host_blocks=4)
    yield manager
    manager.check_integrity()


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


# --- swapping


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
