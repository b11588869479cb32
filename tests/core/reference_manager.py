"""A block manager in plain Python: lists, searched and counted anew each time, with nothing cached that could get out of step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pagedcore.engine.step_plan import Header, Int32Array, StepLayout


@dataclass(eq=False)
class Node:
    """A cached prefix: equal only to itself, so that one which was evicted and computed again is another one."""

    parent: Node | None
    tokens: tuple[int, ...]


@dataclass
class ReferenceManager:
    """What BlockManager does, block for block. Sequences are added by `start` (add and match_prefix at once)."""

    num_blocks: int
    block_size: int
    num_host_blocks: int
    tables: dict[int, list[int]] = field(default_factory=dict)
    swapped: dict[int, list[object]] = field(default_factory=dict)  # sequence -> its host blocks
    prefixes: dict[int, Node | None] = field(default_factory=dict)  # committed prefix; None: out of the cache
    num_committed: dict[int, int] = field(default_factory=dict)
    cached: dict[int, Node] = field(default_factory=dict)  # block -> prefix
    copies: dict[int, int] = field(default_factory=dict)  # destination -> source
    roots: dict[str, Node] = field(default_factory=dict)
    num_evictions: int = 0

    def __post_init__(self) -> None:
        self.unwanted = list(range(self.num_blocks))  # taken from the front
        self.retained: list[int] = []  # then these, least recently used first

    @property
    def num_free(self) -> int:
        return len(self.unwanted) + len(self.retained)

    @property
    def num_free_host(self) -> int:
        return self.num_host_blocks - len({block for table in self.swapped.values() for block in table})

    def owners(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables.values())

    def find(self, parent: Node, tokens: tuple[int, ...]) -> int | None:
        matches = [block for block, node in self.cached.items() if node.parent is parent and node.tokens == tokens]
        assert len(matches) <= 1
        return matches[0] if matches else None

    def block_tokens(self, tokens: list[int], index: int) -> tuple[int, ...]:
        return tuple(tokens[index * self.block_size : (index + 1) * self.block_size])

    def start(self, seq_id: int, tokens: list[int], max_tokens: int, salt: str) -> int:
        table = self.tables[seq_id] = []
        node = self.roots.setdefault(salt, Node(None, ()))
        while len(table) < min(max_tokens, len(tokens)) // self.block_size:
            block = self.find(node, self.block_tokens(tokens, len(table)))
            if block is None:
                break
            if block in self.retained:
                self.retained.remove(block)
            table.append(block)
            node = self.cached[block]
        self.prefixes[seq_id], self.num_committed[seq_id] = node, len(table)
        return len(table) * self.block_size

    def take(self) -> int:
        if self.unwanted:
            return self.unwanted.pop(0)
        self.num_evictions += 1
        block = self.retained.pop(0)
        del self.cached[block]
        return block

    def settle(self, block: int) -> None:
        """A table or a copy let go of the block."""
        if self.owners(block) == 0 and block in self.copies:
            self.cached.pop(block, None)
            self.settle(self.copies.pop(block))
        if self.owners(block) == 0 and block not in self.copies.values():
            if block in self.cached:
                self.retained.append(block)
            else:
                self.unwanted.insert(0, block)

    def grow(self, seq_id: int, num_tokens: int, write_from: int) -> bool:
        table = self.tables[seq_id]
        num_needed = -(-num_tokens // self.block_size)
        written = sorted({p // self.block_size for p in range(write_from, num_tokens)} & set(range(len(table))))
        shared = [i for i in written if self.owners(table[i]) > 1]
        if max(0, num_needed - len(table)) + len(shared) > self.num_free:
            return False
        for i in written:
            if i in shared:
                source, table[i] = table[i], self.take()
                self.copies[table[i]] = self.copies.get(source, source)
            else:
                self.cached.pop(table[i], None)
        while len(table) < num_needed:
            table.append(self.take())
        if written and written[0] < self.num_committed[seq_id]:
            self.prefixes[seq_id] = None
        return True

    def commit(self, seq_id: int, tokens: list[int], num_computed: int) -> None:
        for i in range(self.num_committed[seq_id], min(num_computed, len(tokens)) // self.block_size):
            node = self.prefixes[seq_id]
            if node is None or (node.parent is not None and node not in self.cached.values()):
                self.prefixes[seq_id] = None
                return
            block = self.find(node, self.block_tokens(tokens, i))
            if block is None:
                block = self.tables[seq_id][i]
                if block in self.cached:  # by a fork, behind an equal prefix that is gone
                    self.prefixes[seq_id] = None
                    return
                self.cached[block] = Node(node, self.block_tokens(tokens, i))
            self.prefixes[seq_id], self.num_committed[seq_id] = self.cached[block], i + 1

    def fork(self, parent: int, child: int) -> None:
        self.tables[child] = list(self.tables[parent])
        self.prefixes[child], self.num_committed[child] = self.prefixes[parent], self.num_committed[parent]

    def release(self, seq_id: int) -> None:
        self.swapped.pop(seq_id, None)
        table = self.tables.get(seq_id, [])
        while table:
            self.settle(table.pop())
        self.tables.pop(seq_id, None)

    def swap_out(self, seq_ids: list[int]) -> bool:
        host_of: dict[int, object] = {block: object() for seq_id in seq_ids for block in self.tables[seq_id]}
        if len(host_of) > self.num_free_host:
            return False
        tables = {seq_id: [host_of[block] for block in self.tables[seq_id]] for seq_id in seq_ids}
        for seq_id in seq_ids:
            self.release(seq_id)
        self.swapped |= tables
        return True

    def swap_in(self, seq_ids: list[int]) -> bool:
        blocks = list(dict.fromkeys(block for seq_id in seq_ids for block in self.swapped[seq_id]))
        if len(blocks) > self.num_free:
            return False
        device_of = {block: self.take() for block in blocks}
        for seq_id in seq_ids:
            self.tables[seq_id] = [device_of[block] for block in self.swapped.pop(seq_id)]
        return True

    def holding(self, seq_ids: list[int]) -> tuple[int, int]:
        held = [block for seq_id in seq_ids for block in self.tables[seq_id]]
        return len(set(held)), sum(held.count(block) == self.owners(block) for block in set(held))

    def finish_copies(self) -> None:
        while self.copies:
            self.settle(self.copies.pop(next(iter(self.copies))))

    def reset_prefix_cache(self) -> None:
        self.unwanted += self.retained
        self.retained.clear()
        self.cached.clear()
        self.prefixes = dict.fromkeys(self.prefixes)


@dataclass(frozen=True)
class ReferenceRow:
    """One row of a step, as fill_step takes it."""

    table: list[int]
    num_computed: int
    query_len: int
    token_ids: list[int]
    last_row: int


def reference_step(
    rows: list[ReferenceRow], layout: StepLayout, block_size: int, copies: list[tuple[int, int]], untouched: int
) -> Int32Array:
    """The packed buffer of a step; `untouched` stands in the sampling section."""
    buffer = np.full(layout.copies + 2 * len(copies), untouched, np.int32)
    buffer[: layout.sampling] = 0
    buffer[layout.slot_mapping : layout.query_start_loc] = -1
    token = 0
    for r, row in enumerate(rows):
        for position in range(row.num_computed, row.num_computed + row.query_len):
            known = position < len(row.token_ids)
            buffer[layout.token_ids + token] = row.token_ids[position] if known else -1 - row.last_row
            buffer[layout.positions + token] = position
            buffer[layout.slot_mapping + token] = row.table[position // block_size] * block_size + position % block_size
            token += 1
        seq_len = row.num_computed + row.query_len if row.query_len else 0
        buffer[layout.seq_lens + r] = seq_len
        buffer[layout.query_start_loc + r + 1 : layout.seq_lens] = token
        for i in range(-(-seq_len // block_size)):
            buffer[layout.block_tables + r * layout.table_width + i] = row.table[i]
    buffer[layout.copies :] = np.array(copies, np.int32).reshape(-1)
    query_lens = [row.query_len for row in rows]
    seq_lens = [row.num_computed + row.query_len for row in rows if row.query_len]
    header = Header(
        num_tokens=layout.num_tokens,
        num_rows=layout.num_rows,
        table_width=layout.table_width,
        num_real_tokens=token,
        num_real_rows=len(rows),
        max_query_len=max(query_lens, default=0),
        max_seq_len=max(seq_lens, default=0),
        num_copies=len(copies),
        extras_offset=0,
        num_extras=0,
        any_random=0,
        max_logprobs=-1,
    )
    buffer[: len(header)] = header
    return buffer
