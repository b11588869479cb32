"""Moves preempted groups to the host's block pool and back (Kwon et al. 2023, section 4.5)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from pagedcore._core import BlockManager
from pagedcore.engine.sequence_group import SequenceGroup
from pagedcore.engine.step_plan import Int32Array, Swaps


class PreemptionMode(Enum):
    """How a preempted group gets its K/V back; AUTO: by whichever is estimated to cost less."""

    AUTO = "auto"
    RECOMPUTE = "recompute"
    SWAP = "swap"


@dataclass(frozen=True)
class _Move:
    group: SequenceGroup
    pairs: list[tuple[int, int]]  # (source block, destination block)


class SwapSpace:
    """Decides who is swapped, and keeps what has to be copied until a step carries it out.

    Before a step, first everything goes out, then everything comes in: nothing is swapped out between a `swap_in` and the
    next `take`.
    """

    def __init__(self, blocks: BlockManager, mode: PreemptionMode, swap_cost_tokens: float) -> None:
        """`swap_cost_tokens`: see `KVCacheShape`."""
        self.num_blocks_out = 0
        self.num_blocks_in = 0
        self._blocks = blocks
        self._mode = mode
        self._swap_cost_tokens = swap_cost_tokens
        self._out: list[_Move] = []
        self._in: list[_Move] = []

    def swap_out(self, group: SequenceGroup) -> bool:
        """Move a running group's blocks to the host; False, and nothing is changed, if it had better be recomputed."""
        if self._in or not self._is_worth_it(group):
            return False
        pairs = self._blocks.swap_out(group.table_ids)
        if pairs is None:
            return False
        group.num_swapped_blocks = len(pairs)
        self.num_blocks_out += len(pairs)
        self._out.append(_Move(group, pairs))
        return True

    def swap_in(self, group: SequenceGroup) -> bool:
        """Move a swapped group's blocks back; False if there is no room."""
        pairs = self._blocks.swap_in(group.table_ids)
        if pairs is None:
            return False
        self.num_blocks_in += len(pairs)
        self._in.append(_Move(group, [(host, device) for device, host in pairs]))
        return True

    def forget(self, group: SequenceGroup) -> None:
        """Copy nothing for a group whose blocks are being released: they may have other contents in the same step."""
        self._out = [move for move in self._out if move.group is not group]
        self._in = [move for move in self._in if move.group is not group]

    def is_moving(self, group: SequenceGroup) -> bool:
        """Whether blocks of a group are still to be copied."""
        return any(move.group is group for moves in (self._out, self._in) for move in moves)

    def take(self) -> Swaps | None:
        """What the step being planned has to copy first; None: nothing."""
        if not self._out and not self._in:
            return None
        moves = self._out + self._in
        swaps = Swaps(_pairs(self._out), _pairs(self._in), list(dict.fromkeys(move.group for move in moves)))
        self._out, self._in = [], []
        return swaps

    def _is_worth_it(self, group: SequenceGroup) -> bool:
        if self._mode is PreemptionMode.RECOMPUTE or self._blocks.num_host_blocks == 0 or group.trunk is not None:
            return False
        if self._mode is PreemptionMode.SWAP:
            return True
        # What others hold as well stays on the device, and recomputation would find it in the prefix cache.
        num_blocks, num_exclusive = self._blocks.holding(group.table_ids)
        return num_blocks * self._swap_cost_tokens < num_exclusive * self._blocks.block_size


def _pairs(moves: list[_Move]) -> Int32Array:
    return np.array([pair for move in moves for pair in move.pairs], np.int32).reshape(-1, 2)
