"""Where every unfinished group is: waiting, running, preempted or swapped; and its way from one to the other."""

from __future__ import annotations

import bisect
import itertools

from pagedcore._core import BlockManager
from pagedcore.engine.clock import Clock
from pagedcore.engine.precedence import rank_of
from pagedcore.engine.sequence import NEVER, FinishReason, Sequence
from pagedcore.engine.sequence_group import GroupStatus, SequenceGroup
from pagedcore.engine.step_packer import StepPacker
from pagedcore.engine.swap_space import SwapSpace
from pagedcore.engine.telemetry import Recorder, request_record
from pagedcore.engine.waiting_queue import WaitingQueue


class GroupLifecycle:
    """Owns every unfinished group, and sees to its blocks and rows as its status changes.

    `running` groups own blocks and rows; `running` and `preempted` are in order of their ranks: the most urgent first, then
    the one admitted first. `with_trunk` are running groups whose common tokens are being computed; `num_reserved_rows`, the
    widths of the running groups.
    """

    def __init__(
        self,
        blocks: BlockManager,
        packer: StepPacker,
        swap_space: SwapSpace,
        recorder: Recorder | None,
        clock: Clock,
    ) -> None:
        self.waiting = WaitingQueue()
        self.preempted: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self.with_trunk: list[SequenceGroup] = []
        self.num_reserved_rows = 0
        self.num_preemptions = 0
        self.num_finished = dict.fromkeys(FinishReason, 0)
        self._blocks = blocks
        self._packer = packer
        self._swap_space = swap_space
        self._recorder = recorder
        self._clock = clock
        self._seq_ids = itertools.count()
        self._admissions = itertools.count()

    def new_seq_id(self) -> int:
        """An id for a sequence; they grow, and order groups by arrival."""
        return next(self._seq_ids)

    def start(self, group: SequenceGroup) -> None:
        """Move a group from its queue to the running ones."""
        if group.status is GroupStatus.WAITING:
            self.waiting.admit(group, group.num_prompt_tokens - group.num_cached_tokens)
            group.rank = (group.priority, next(self._admissions))
        else:
            self.preempted.pop(0)
        group.status = GroupStatus.RUNNING
        group.started_at = self._packer.num_steps
        if group.scheduled_at is None:
            group.scheduled_at = self._clock()
        self.num_reserved_rows += group.width
        for seq in group.sequences:
            self._packer.add(seq, group.num_logprobs)
        if group.trunk is not None:
            group.trunk.slot = group.lead.slot
            self.with_trunk.append(group)
        bisect.insort(self.running, group, key=rank_of)

    def preempt(self, group: SequenceGroup, *, may_swap: bool = True) -> None:
        """Take a running group's blocks away, until there is room again: they go to the host, or are recomputed then.

        A group that runs alone is recomputed: it ran out of room by itself, and may find more of it shared when it begins
        again, while blocks that come back from the host are all its own.
        """
        if may_swap and len(self.running) > 1 and self._swap_space.swap_out(group):
            status = GroupStatus.SWAPPED
        else:
            status = GroupStatus.PREEMPTED
            self._release(group)
        self._stop_running(group)
        group.status = status
        if status is GroupStatus.PREEMPTED:
            group.restart()
            if group.search is not None:
                self._drop_in_flight(group)  # a beam's candidates are of use only together with its blocks
        bisect.insort(self.preempted, group, key=rank_of)
        self.num_preemptions += 1

    def restart(self, group: SequenceGroup) -> None:
        """Have an unfinished group recomputed; what launched steps draw for it is dropped."""
        if group.status is GroupStatus.RUNNING:
            self.preempt(group, may_swap=False)
        elif group.status is GroupStatus.SWAPPED:
            self._release(group)
            group.status = GroupStatus.PREEMPTED
        group.restart()
        self._drop_in_flight(group)

    def restart_if_moving(self, group: SequenceGroup) -> None:
        """Restart a group whose copies to the host or back are pending, now that one of its tables has been released.

        The copies into the blocks of that table must not be made: they may be somebody else's by then.
        """
        if self._swap_space.is_moving(group):
            self.restart(group)

    def abort(self, group: SequenceGroup, reason: FinishReason = FinishReason.ABORT) -> None:
        """End an unfinished group wherever it is; its blocks are back in the pool on return.

        A launched step may still be writing to them. Steps run in order, so that is over before a later step can use them.
        """
        self.end_group(group, reason)
        group.finish_reason = reason
        for seq in group.sequences:
            seq.finish_reason, seq.valid_from = reason, NEVER

    def end_sequence(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence, wherever its group is, and with the last one the group."""
        group = seq.group
        seq.finish_reason, seq.valid_from = reason, NEVER
        if len(group.sequences) == 1:
            self.end_group(group, reason)
            return
        if group.trunk is not None:
            self.restart(group)  # the trunk may be in this sequence's blocks
        if group.status in (GroupStatus.RUNNING, GroupStatus.SWAPPED):
            self._blocks.release(seq.seq_id)
        if group.status is GroupStatus.RUNNING:
            self._packer.remove(seq)
        group.sequences.remove(seq)
        group.num_ended_tokens += seq.num_output_tokens
        self.restart_if_moving(group)

    def end_group(self, group: SequenceGroup, reason: FinishReason) -> None:
        """Take a group off its queue, for good, and its blocks back."""
        self._release(group)
        if group.status is GroupStatus.RUNNING:
            self._stop_running(group)
        elif group.status is not GroupStatus.WAITING:
            self.preempted.remove(group)
        self.waiting.close(group, waits=group.status is GroupStatus.WAITING)
        group.status = GroupStatus.FINISHED
        self.num_finished[reason] += 1
        if self._recorder is not None:
            self._recorder.add_request(request_record(group, reason, self._clock()))

    def _release(self, group: SequenceGroup) -> None:
        """Give back the blocks that a group owns, of the device or of the host."""
        if group.status in (GroupStatus.RUNNING, GroupStatus.SWAPPED):
            self._swap_space.forget(group)
            for seq_id in group.table_ids:
                self._blocks.release(seq_id)

    def _stop_running(self, group: SequenceGroup) -> None:
        """Take a group off the running ones, and its rows back."""
        for seq in group.sequences:
            self._packer.remove(seq)
        if group.trunk is not None:
            self.with_trunk.remove(group)
        self.num_reserved_rows -= group.width
        self.running.remove(group)

    def _drop_in_flight(self, group: SequenceGroup) -> None:
        """Have what launched steps say of a group dropped."""
        group.restarted_at = self._packer.num_steps
        for seq in group.sequences:
            seq.num_in_flight = 0
            seq.valid_from = group.restarted_at
