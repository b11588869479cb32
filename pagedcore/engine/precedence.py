"""Who goes before whom among the groups that have been admitted, and who has to go for a more urgent one."""

from __future__ import annotations

from dataclasses import dataclass

from pagedcore._core import BlockManager
from pagedcore.engine.sequence_group import SequenceGroup


@dataclass(frozen=True)
class Shortage:
    """What a waiting group lacks to be admitted; nothing where a number is not above 0."""

    num_rows: int
    num_blocks: int


def rank_of(group: SequenceGroup) -> tuple[int, int]:
    """The sort key of running and preempted groups."""
    return group.rank


def count_victims(group: SequenceGroup, running: list[SequenceGroup], shortage: Shortage, blocks: BlockManager) -> int:
    """How many of the last `running` groups (in order of rank) to preempt for `group`: 0 if that could not help.

    Only less urgent ones are. Blocks that groups share count for each of them, so that it may turn out to be too few.
    """
    num_rows, num_blocks, num_victims = shortage.num_rows, shortage.num_blocks, 0
    for victim in reversed(running):
        if num_rows <= 0 and num_blocks <= 0:
            break
        if victim.priority <= group.priority:
            return 0
        num_rows -= victim.width
        num_blocks -= sum(blocks.blocks_needed(seq.num_computed_tokens) for seq in victim.active)
        num_victims += 1
    return num_victims
