"""What holds of the engine's state after every step, looked at from outside."""

from __future__ import annotations

from itertools import pairwise

from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.sequence_group import GroupStatus, SequenceGroup
from tests.simulation.failure import require
from tests.simulation.scenario import Setup
from tests.simulation.watched_blocks import WatchedBlocks


class Invariants:
    """Examines scheduler and block manager between two steps. Tables that exist at the beginning are the pinned ones."""

    def __init__(self, scheduler: Scheduler, blocks: WatchedBlocks, setup: Setup) -> None:
        self._scheduler = scheduler
        self._blocks = blocks
        self._setup = setup
        self._pinned = frozenset(blocks.seq_ids)
        self._num_free_at_rest = blocks.num_free_blocks

    def check(self) -> None:
        """Raise SimulationError, or the block manager's own RuntimeError, for the first violated one."""
        self._blocks.check_integrity()
        self._check_places()
        self._check_tables()
        for group in self._scheduler.running:
            self._check_progress(group)

    def check_at_rest(self) -> None:
        """What holds in addition when no request is open: nothing is left of any."""
        blocks, scheduler = self._blocks, self._scheduler
        require(not scheduler.has_unfinished() and len(scheduler.waiting) == 0, "the scheduler keeps a request")
        require(scheduler.waiting.num_tokens == 0, "tokens wait that belong to no request")
        require(not scheduler.waiting.is_shared, "tenants compete when nobody is there")
        require(blocks.seq_ids == self._pinned, "a block table outlives its request")
        require(blocks.num_free_blocks == self._num_free_at_rest, "blocks are lost")
        require(blocks.num_free_host_blocks == blocks.num_host_blocks, "host blocks are lost")
        require(scheduler.num_free_slots == self._setup.max_num_seqs, "rows of sampling parameters are lost")

    def _check_places(self) -> None:
        """Every group is in one place, in order, and the running ones have rows."""
        running, preempted = self._scheduler.running, self._scheduler.preempted
        for group in running:
            require(group.status is GroupStatus.RUNNING, f"{group.request_id} runs and is {group.status.value}")
        for group in preempted:
            is_out = group.status in (GroupStatus.PREEMPTED, GroupStatus.SWAPPED)
            require(is_out, f"{group.request_id} is among the preempted and is {group.status.value}")
        for groups in (running, preempted):
            require(all(a.rank < b.rank for a, b in pairwise(groups)), "groups are not in the order of their ranks")
        require(sum(group.width for group in running) <= self._setup.max_num_seqs, "there are more rows than fit")
        slots = [seq.slot for group in running for seq in group.sequences]
        require(len(set(slots)) == len(slots) and -1 not in slots, "two sequences share a row of sampling parameters")
        num_taken = self._setup.max_num_seqs - self._scheduler.num_free_slots
        require(num_taken == len(slots), f"{len(slots)} sequences run and {num_taken} rows are taken")

    def _check_tables(self) -> None:
        """There are the block tables of the groups that own blocks, and no others; what they do not hold is free."""
        blocks = self._blocks
        resident = {seq_id for group in self._scheduler.running for seq_id in group.table_ids}
        swapped = [group for group in self._scheduler.preempted if group.status is GroupStatus.SWAPPED]
        on_host = {seq_id for group in swapped for seq_id in group.table_ids}
        require(blocks.resident == resident | self._pinned, "the block tables are not those of the running groups")
        require(blocks.on_host == on_host, "the host's block tables are not those of the swapped groups")
        used: set[int] = set()
        for seq_id in blocks.resident:
            used.update(blocks.block_table(seq_id))
        require(len(used) + blocks.num_free_blocks == blocks.num_blocks, "a block is neither free nor in a table")
        num_host_used = blocks.num_host_blocks - blocks.num_free_host_blocks
        num_swapped = sum(group.num_swapped_blocks for group in swapped)
        require(bool(swapped) <= num_host_used <= num_swapped, f"{num_host_used} host blocks hold {num_swapped} blocks")

    def _check_progress(self, group: SequenceGroup) -> None:
        """A sequence's counters agree with each other and with its blocks."""
        tables = group.sequences if group.trunk is None else [group.trunk]
        for seq in tables:
            num_known = len(seq.token_ids)
            require(seq.num_in_flight in ((0, 1) if self._setup.one_step_ahead else (0,)), "draws are in flight")
            require(0 <= seq.num_computed_tokens <= num_known + seq.num_in_flight, "more is computed than there is")
            num_blocks = len(self._blocks.block_table(seq.seq_id))
            least = self._blocks.blocks_needed(seq.num_computed_tokens)
            most = self._blocks.blocks_needed(max(num_known, seq.num_computed_tokens))
            require(least <= num_blocks <= most, f"{num_blocks} blocks hold {num_known} tokens of {group.request_id}")
