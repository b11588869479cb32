"""Contiguous reservation: the buddy system against a plain Python one, and the anatomy of its waste (figure 3)."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagedcore._core import BlockManager, ContiguousManager


class ContiguousManagerMachine(RuleBasedStateMachine):
    """Random reservations and releases, against a search over every aligned range of the pool."""

    @initialize(num_blocks=st.integers(1, 70), block_size=st.sampled_from([1, 3, 16]))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.manager = ContiguousManager(num_blocks, block_size)
        self.free = [True] * num_blocks
        self.tables: dict[int, list[int]] = {}
        self.next_id = 0

    def free_ranges(self, length: int) -> list[int]:
        """Where an aligned, wholly free range of so many blocks starts."""
        starts = range(0, len(self.free) - length + 1, length)
        return [start for start in starts if all(self.free[start : start + length])]

    @rule(num_tokens=st.integers(1, 600), more=st.integers(0, 40))
    def reserve(self, num_tokens: int, more: int) -> None:
        seq_id, self.next_id = self.next_id, self.next_id + 1
        self.manager.add(seq_id)
        needed = self.manager.blocks_needed(num_tokens)
        length = 1
        while length < needed:
            length *= 2
        ranges = self.free_ranges(length)
        assert self.manager.grow(seq_id, num_tokens, 0) == bool(ranges)
        table = self.manager.block_table(seq_id)
        self.tables[seq_id] = table
        if not ranges:
            assert table == []
            return
        assert table == list(range(table[0], table[0] + length)) and table[0] in ranges
        # The shortest range that is long enough: one that is part of a longer free range is cut only where it must be.
        longest_kept = self.longest_range_around(table[0], length)
        assert longest_kept == min(self.longest_range_around(start, length) for start in ranges)
        for block in table:
            self.free[block] = False
        room = length * self.manager.block_size
        assert self.manager.grow(seq_id, num_tokens + more, num_tokens) == (num_tokens + more <= room)
        assert self.manager.block_table(seq_id) == table, "a reservation never moves or grows"

    def longest_range_around(self, start: int, length: int) -> int:
        """Length of the largest aligned free range that `start` is in: what the buddy system has joined it into."""
        while True:
            doubled = 2 * length
            begin = start - start % doubled
            if begin + doubled > len(self.free) or not all(self.free[begin : begin + doubled]):
                return length
            length = doubled

    @rule(index=st.integers(0, 99))
    def release(self, index: int) -> None:
        if not self.tables:
            return
        seq_id = sorted(self.tables)[index % len(self.tables)]
        self.manager.release(seq_id)
        for block in self.tables.pop(seq_id):
            self.free[block] = True

    @invariant()
    def agrees_with_the_reference(self) -> None:
        self.manager.check_integrity()
        assert self.manager.num_free_blocks == sum(self.free)
        longest = self.manager.max_blocks_per_sequence
        assert longest <= self.manager.num_blocks < 2 * longest


TestContiguousManagerMachine = ContiguousManagerMachine.TestCase
TestContiguousManagerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_pool_of_the_paper_has_room_for_seven_reservations_of_2048_tokens() -> None:
    """Figure 13: Orca (Max) runs 7.00 requests at once in 15.7K slots."""
    manager = ContiguousManager(15_700 // 16, 16)
    admitted = 0
    for seq_id in range(20):
        manager.add(seq_id)
        admitted += manager.grow(seq_id, 2048, 0)
    assert admitted == 7


def test_a_reservation_belongs_to_one_sequence() -> None:
    manager = ContiguousManager(8, 4)
    manager.add(0)
    assert manager.grow(0, 9, 0)
    with pytest.raises(ValueError, match="a contiguous reservation cannot be shared"):
        manager.fork(0, 1)
    with pytest.raises(ValueError, match="write_from must be in"):
        manager.grow(0, 9, 10)
    with pytest.raises(KeyError, match="no sequence 5"):
        manager.release(5)
    assert manager.swap_out([0]) is None
    assert manager.block_table(0) == [0, 1, 2, 3] and not manager.has(1)
    manager.release(0)
    manager.add(0)
    manager.release(0)  # one that never reserved anything
    assert manager.num_free_blocks == 8
    assert isinstance(manager, BlockManager)
