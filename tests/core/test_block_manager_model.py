"""Random histories: the block manager against a plain Python one, and every live sequence against the K/V it must see."""

from __future__ import annotations

import random
from array import array
from collections.abc import Collection
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagedcore._core import BlockManager
from pagedcore.engine.step_plan import StepLayout
from tests.core.reference_manager import ReferenceManager, ReferenceRow, reference_step

UNTOUCHED = -77
# What a slot holds: all that the K/V of a position depend on (salt and tokens up to and with it); None: never written.
Contents = tuple[str, tuple[int, ...]] | None

few_tokens = st.lists(st.integers(0, 1), min_size=1, max_size=12)
rarely = st.integers(0, 5).map(lambda draw: draw == 5)
shuffles = st.randoms(use_true_random=False)
paddings = st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2))


@dataclass
class LiveSequence:
    tokens: list[int]
    num_computed: int
    salt: str

    def contents(self, position: int) -> Contents:
        return self.salt, tuple(self.tokens[: position + 1])


class BlockManagerMachine(RuleBasedStateMachine):
    """Drives the manager as a scheduler would (in odd orders), and carries out its decisions on a memory of prefixes."""

    @initialize(
        num_blocks=st.integers(3, 16),
        block_size=st.sampled_from([1, 2, 3, 4]),
        num_host_blocks=st.integers(0, 8),
        hash_bits=st.sampled_from([1, 2, 3, 6, 64]),
    )
    def build(self, num_blocks: int, block_size: int, num_host_blocks: int, hash_bits: int) -> None:
        self.manager = BlockManager(num_blocks, block_size, num_host_blocks=num_host_blocks, hash_bits=hash_bits)
        self.reference = ReferenceManager(num_blocks, block_size, num_host_blocks)
        self.memory: list[list[Contents]] = [[None] * block_size for _ in range(num_blocks)]
        self.host_memory: list[list[Contents]] = [[None] * block_size for _ in range(num_host_blocks)]
        self.sequences: dict[int, LiveSequence] = {}
        self.next_id = 7

    def resident(self, index: int) -> int:
        """Any sequence on the device; there always is one."""
        if not self.reference.tables:
            self.add([0, 1, 1, 0], max_tokens=3, salt="")
        ids = sorted(self.reference.tables)
        return ids[index % len(ids)]

    @rule(tokens=few_tokens, cut=st.integers(0, 3), salt=st.sampled_from(["", "", "", "red"]), shuffle=shuffles)
    def start(self, tokens: list[int], cut: int, salt: str, shuffle: random.Random) -> None:
        """A sequence whose prompt is computed at once, if there is room."""
        self.add(tokens, max(len(tokens) - cut, 0), salt)
        self.step([(len(self.reference.tables) - 1, len(tokens))], (0, 0, 0), False, False, shuffle)

    def add(self, tokens: list[int], max_tokens: int, salt: str) -> None:
        seq_id, self.next_id = self.next_id, self.next_id + 1
        self.manager.add(seq_id)
        num_cached = self.manager.match_prefix(seq_id, array("i", tokens), max_tokens, salt)
        assert num_cached == self.reference.start(seq_id, tokens, max_tokens, salt)
        self.sequences[seq_id] = LiveSequence(tokens, num_cached, salt)

    @rule(index=st.integers(0, 99), more=few_tokens)
    def append_tokens(self, index: int, more: list[int]) -> None:
        self.sequences[self.resident(index)].tokens.extend(more)

    @rule(index=st.integers(0, 99), keep=st.integers(0, 24), replacement=few_tokens)
    def rewind(self, index: int, keep: int, replacement: list[int]) -> None:
        """Rejected tokens are replaced: blocks already committed will be written again."""
        sequence = self.sequences[self.resident(index)]
        sequence.tokens = sequence.tokens[:keep] + replacement
        sequence.num_computed = min(sequence.num_computed, keep, len(sequence.tokens))

    @rule(index=st.integers(0, 99), num_tokens=st.integers(0, 16), back=st.integers(0, 8))
    def grow_anywhere(self, index: int, num_tokens: int, back: int) -> None:
        self.plan_only(self.resident(index), num_tokens, max(num_tokens - back, 0))

    def plan_only(self, seq_id: int, num_tokens: int, write_from: int) -> None:
        """A step that is planned and then not taken; its copies stay pending."""
        grown = self.manager.grow(seq_id, num_tokens, write_from)
        assert grown == self.reference.grow(seq_id, num_tokens, write_from)
        sequence = self.sequences[seq_id]
        if grown:
            sequence.num_computed = min(sequence.num_computed, write_from)

    @rule(
        choices=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 12)), min_size=1, max_size=4),
        padding=paddings,
        in_flight=st.booleans(),
        uncommitted=rarely,
        shuffle=shuffles,
    )
    def step(
        self,
        choices: list[tuple[int, int]],
        padding: tuple[int, int, int],
        in_flight: bool,
        uncommitted: bool,
        shuffle: random.Random,
    ) -> None:
        queries: dict[int, int] = {}
        for index, wanted in choices:
            seq_id = self.resident(index)
            sequence = self.sequences[seq_id]
            query_len = min(wanted, len(sequence.tokens) - sequence.num_computed)
            if query_len < 1 or seq_id in queries:
                continue
            end = sequence.num_computed + query_len
            if query_len == 1:
                grown = self.manager.grow_many([seq_id], [end], [end - 1]) == 1
            else:
                grown = self.manager.grow(seq_id, end, sequence.num_computed)
            assert grown == self.reference.grow(seq_id, end, sequence.num_computed)
            if grown:
                queries[seq_id] = query_len
        self.take_step(queries, padding, in_flight, shuffle)
        for seq_id, query_len in queries.items():
            sequence = self.sequences[seq_id]
            sequence.num_computed += query_len
            if not uncommitted:
                self.manager.commit(seq_id, array("i", sequence.tokens), sequence.num_computed)
                self.reference.commit(seq_id, sequence.tokens, sequence.num_computed)

    def take_step(
        self, queries: dict[int, int], padding: tuple[int, int, int], in_flight: bool, shuffle: random.Random
    ) -> None:
        """Fill the buffer, compare it, and do what it says."""
        block_size = self.reference.block_size
        rows: list[ReferenceRow] = []
        for seq_id, query_len in queries.items():
            sequence = self.sequences[seq_id]
            end = sequence.num_computed + query_len
            known = sequence.tokens[: end - 1] if in_flight else sequence.tokens
            table = self.reference.tables[seq_id]
            rows.append(ReferenceRow(table, sequence.num_computed, query_len, known, last_row=len(rows) * 3))
        widest = max((-(-(row.num_computed + row.query_len) // block_size) for row in rows), default=0)
        layout = StepLayout(sum(queries.values()) + padding[1], len(rows) + padding[0], widest + padding[2])
        buffer = np.full(layout.copies + 2 * len(self.reference.copies) + 5, UNTOUCHED, np.int32)
        used = self.manager.fill_step(
            buffer,
            num_rows=layout.num_rows,
            num_tokens=layout.num_tokens,
            table_width=layout.table_width,
            seq_ids=list(queries),
            num_computed=[row.num_computed for row in rows],
            query_lens=[row.query_len for row in rows],
            token_ids=[array("i", row.token_ids) for row in rows],
            last_rows=[row.last_row for row in rows],
        )
        copies = [(int(source), int(target)) for source, target in buffer[layout.copies : used].reshape(-1, 2)]
        assert sorted(copies) == sorted((source, target) for target, source in self.reference.copies.items())
        np.testing.assert_array_equal(buffer[:used], reference_step(rows, layout, block_size, copies, UNTOUCHED))
        assert (buffer[used:] == UNTOUCHED).all()

        shuffle.shuffle(copies)  # they must be independent of each other
        for source, target in copies:
            self.memory[target] = list(self.memory[source])
        self.reference.finish_copies()
        slots = iter(buffer[layout.slot_mapping : layout.query_start_loc].tolist())
        for seq_id, query_len in queries.items():
            sequence = self.sequences[seq_id]
            for position in range(sequence.num_computed, sequence.num_computed + query_len):
                block, offset = divmod(next(slots), block_size)
                self.memory[block][offset] = sequence.contents(position)

    @rule(index=st.integers(0, 99), writes=st.booleans())
    def fork(self, index: int, writes: bool) -> None:
        parent = self.resident(index)
        child, self.next_id = self.next_id, self.next_id + 1
        self.manager.fork(parent, child)
        self.reference.fork(parent, child)
        sequence = self.sequences[parent]
        self.sequences[child] = LiveSequence(list(sequence.tokens), sequence.num_computed, sequence.salt)
        if writes:
            self.plan_only(child, sequence.num_computed + 1, sequence.num_computed)

    @rule(index=st.integers(0, 99))
    def release(self, index: int) -> None:
        self.resident(0)
        seq_id = sorted(self.sequences)[index % len(self.sequences)]
        self.manager.release(seq_id)
        self.reference.release(seq_id)
        del self.sequences[seq_id]

    @rule(index=st.integers(0, 99), count=st.integers(1, 3))
    def swap_out(self, index: int, count: int) -> None:
        self.resident(0)
        seq_ids = self.some(self.reference.tables, index, count)
        assert self.manager.holding(seq_ids) == self.reference.holding(seq_ids)
        pairs = self.manager.swap_out(seq_ids)
        assert (pairs is not None) == self.reference.swap_out(seq_ids)
        for block, host_block in pairs or []:
            self.host_memory[host_block] = list(self.memory[block])

    @rule(index=st.integers(0, 99), count=st.integers(1, 3))
    def swap_in(self, index: int, count: int) -> None:
        seq_ids = self.some(self.reference.swapped, index, count)
        pairs = self.manager.swap_in(seq_ids)
        assert (pairs is not None) == self.reference.swap_in(seq_ids)
        for block, host_block in pairs or []:
            self.memory[block] = list(self.host_memory[host_block])

    @staticmethod
    def some(tables: Collection[int], index: int, count: int) -> list[int]:
        """Up to `count` of the sequences, from the index-th on."""
        ids = sorted(tables)
        return [ids[(index + i) % len(ids)] for i in range(min(count, len(ids)))]

    @rule(really=rarely)
    def reset_prefix_cache(self, really: bool) -> None:
        if not really:
            return
        self.manager.reset_prefix_cache()
        self.reference.reset_prefix_cache()

    @invariant()
    def agrees_with_the_reference(self) -> None:
        self.manager.check_integrity()
        for seq_id in self.sequences:
            assert self.manager.has(seq_id)
        for seq_id, table in self.reference.tables.items():
            assert self.manager.block_table(seq_id) == table
        assert self.manager.num_free_blocks == self.reference.num_free
        assert self.manager.num_cached_blocks == len(self.reference.cached)
        assert self.manager.num_evictions == self.reference.num_evictions
        assert self.manager.num_free_host_blocks == self.reference.num_free_host

    @invariant()
    def sequences_see_their_own_contents(self) -> None:
        block_size = self.reference.block_size
        for seq_id in self.reference.tables:
            sequence = self.sequences[seq_id]
            table = self.manager.block_table(seq_id)
            for position in range(sequence.num_computed):
                block = self.reference.copies.get(table[position // block_size], table[position // block_size])
                assert self.memory[block][position % block_size] == sequence.contents(position)


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
