"""The real block manager, watched from outside, and told now and then to find no room."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pagedcore.engine.step_plan import Int32Array
from tests.reference.single_growth import SingleGrowth
from tests.simulation.failure import require
from tests.simulation.scenario import NoRoom

if TYPE_CHECKING:
    from pagedcore._core import TokenIds


class WatchedBlocks(SingleGrowth):
    """Keeps a book of its own of the sequences that have a table. Every request for blocks has a number, from 0 on.

    `num_refused`: how many of them it refused on order; `num_swaps`: how often it moved a group to the host or back.
    `on_commit` is called with a table, its tokens and how many of them are said to be computed.
    """

    def __init__(self, num_blocks: int, block_size: int, **options: Any) -> None:
        super().__init__(num_blocks, block_size, **options)
        self.resident: set[int] = set()
        self.on_host: set[int] = set()
        self.fresh_blocks: list[int] = []
        self.num_refused = 0
        self.num_swaps = 0
        self.on_commit: Callable[[list[int], array[int], int], None] | None = None
        self._refused: frozenset[int] = frozenset()
        self._num_requests = 0

    def arm(self, no_room: list[NoRoom]) -> None:
        """Begin to count the requests for blocks, and to refuse these."""
        self._refused = frozenset(fault.first + i for fault in no_room for i in range(fault.count))
        self._num_requests = 0

    @property
    def seq_ids(self) -> set[int]:
        """The sequences that have a table, of the device or of the host."""
        return self.resident | self.on_host

    def add(self, seq_id: int) -> None:
        super().add(seq_id)
        self.resident.add(seq_id)

    def fork(self, parent: int, child: int) -> None:
        super().fork(parent, child)
        (self.on_host if parent in self.on_host else self.resident).add(child)

    def release(self, seq_id: int) -> None:
        super().release(seq_id)
        (self.on_host if seq_id in self.on_host else self.resident).remove(seq_id)

    def grow(self, seq_id: int, num_tokens: int, write_from: int) -> bool:
        if self._is_refused():
            return False
        before = set(self.block_table(seq_id))
        has_grown = super().grow(seq_id, num_tokens, write_from)
        self.fresh_blocks += [block for block in self.block_table(seq_id) if block not in before]
        return has_grown

    def swap_out(self, seq_ids: list[int]) -> list[tuple[int, int]] | None:
        pairs = None if self._is_refused() else super().swap_out(seq_ids)
        if pairs is not None:
            self.num_swaps += 1
            self.resident -= set(seq_ids)
            self.on_host |= set(seq_ids)
        return pairs

    def swap_in(self, seq_ids: list[int]) -> list[tuple[int, int]] | None:
        pairs = None if self._is_refused() else super().swap_in(seq_ids)
        if pairs is not None:
            self.num_swaps += 1
            self.on_host -= set(seq_ids)
            self.resident |= set(seq_ids)
            self.fresh_blocks += [device for device, _ in pairs]
        return pairs

    def fill_step(self, buffer: Int32Array, **step: Any) -> int:
        self._check_writes(step["seq_ids"], step["num_computed"], step["query_lens"])
        return super().fill_step(buffer, **step)

    def match_prefix(self, seq_id: int, token_ids: TokenIds, max_tokens: int, salt: str) -> int:
        num_matched = super().match_prefix(seq_id, token_ids, max_tokens, salt)
        require(num_matched <= max_tokens, f"{num_matched} cached tokens, {max_tokens} wanted at most")
        require(num_matched == len(self.block_table(seq_id)) * self.block_size, "a prefix is not of whole blocks")
        return num_matched

    def commit(self, seq_id: int, token_ids: TokenIds, num_computed: int) -> None:
        super().commit(seq_id, token_ids, num_computed)
        if self.on_commit is not None:
            assert isinstance(token_ids, array)
            self.on_commit(self.block_table(seq_id), token_ids, num_computed)

    def take_fresh_blocks(self) -> list[int]:
        fresh, self.fresh_blocks = self.fresh_blocks, []
        return fresh

    def _is_refused(self) -> bool:
        is_refused = self._num_requests in self._refused
        self._num_requests += 1
        self.num_refused += is_refused
        return is_refused

    def _check_writes(self, seq_ids: list[int], starts: list[int], query_lens: list[int]) -> None:
        """Every block that a step writes is in one table, once."""
        num_owners = [0] * self.num_blocks
        for seq_id in self.resident:
            for block in self.block_table(seq_id):
                num_owners[block] += 1
        for seq_id, start, query_len in zip(seq_ids, starts, query_lens, strict=True):
            if query_len > 0:
                first, last = start // self.block_size, (start + query_len - 1) // self.block_size
                for block in self.block_table(seq_id)[first : last + 1]:
                    require(num_owners[block] == 1, f"sequence {seq_id} writes to block {block}, which is shared")
