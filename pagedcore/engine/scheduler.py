"""Decides what each step computes: one pass over all sequences under a token budget."""

from __future__ import annotations

import time

from pagedcore._core import BlockManager
from pagedcore.engine.admission import Admission
from pagedcore.engine.clock import Clock
from pagedcore.engine.lifecycle import GroupLifecycle
from pagedcore.engine.memory_policy import PAGED, MemoryPolicy
from pagedcore.engine.outputs import EngineStats, TokenOutput
from pagedcore.engine.pinned_prefixes import PinnedPrefixes
from pagedcore.engine.request import Request
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.sequence import FinishReason, Sequence
from pagedcore.engine.sequence_group import GroupStatus, SequenceGroup
from pagedcore.engine.step_packer import Rows, StepPacker
from pagedcore.engine.step_plan import Int32Array, StepPlan, StepResult
from pagedcore.engine.step_results import StepResults
from pagedcore.engine.swap_space import SwapSpace
from pagedcore.engine.telemetry import Recorder


class Scheduler:
    """Plans steps over every unfinished request, as a group of sequences; continuous batching in the order of the `WaitingQueue`.

    The last of the `running` groups is preempted first, with all its sequences (section 4.5). While a group is preempted,
    only more urgent ones are admitted, and none in a step in which blocks ran out. The group of the first rank can therefore
    always go on.

    A sequence has tokens and computed tokens; a step computes some of the difference. Prompts, their chunks, decodes
    and recomputation are this one case. `schedule` may be called before the step before has been committed: what that
    step draws is in flight then, and the plan refers to it by row.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        buffers: list[Int32Array],
        policy: MemoryPolicy = PAGED,
        recorder: Recorder | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.policy = policy
        self._packer = StepPacker(blocks, config.max_num_seqs, config.step_sizes, buffers)
        self._swap_space = SwapSpace(blocks, config.preemption_mode, config.swap_cost_tokens)
        self._pinned = PinnedPrefixes(blocks)
        self._groups = GroupLifecycle(blocks, self._packer, self._swap_space, recorder, clock)
        self._admission = Admission(config, blocks, policy, self._groups, self._swap_space, self._pinned)
        self._results = StepResults(blocks, self._packer, self._groups, recorder, clock)
        self.waiting = self._groups.waiting
        self.preempted = self._groups.preempted
        self.running = self._groups.running

    # ------------------------------------------------------------------ requests in, requests out

    def check_fits(self, request: Request, max_total_tokens: int) -> None:
        """Raise RequestError for a request that could not finish even with the whole pool to itself."""
        self._admission.check_fits(request, max_total_tokens)

    def new_seq_id(self) -> int:
        """An id for a sequence; they grow, and order groups by arrival."""
        return self._groups.new_seq_id()

    def add(self, group: SequenceGroup) -> None:
        """Queue a new group."""
        self.waiting.add(group)

    def abort(self, group: SequenceGroup) -> None:
        """End an unfinished group wherever it is; its blocks are back in the pool on return."""
        self._groups.abort(group, FinishReason.ABORT)

    def end_sequence(self, sequence: Sequence) -> list[TokenOutput]:
        """End one unfinished sequence of a group, with the reason STOP."""
        return self._results.end_sequence(sequence)

    def pin(self, sequence: Sequence) -> None:
        """Keep the blocks of a running sequence, all of which are computed by the steps planned so far, for good."""
        self._pinned.pin(sequence, self.new_seq_id())

    @property
    def num_free_slots(self) -> int:
        """How many more sequences could have a row of sampling parameters."""
        return self._packer.num_free_slots

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting or self.preempted)

    # ------------------------------------------------------------------ planning a step

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or return None when no sequence has anything to compute now."""
        budget = self.config.max_num_batched_tokens
        decodes, chunks = Rows(), Rows()
        if self.waiting and self.policy.is_paged:
            self._admission.make_way()
        has_preempted, budget = self._schedule_running(decodes, chunks, budget)
        wanted = self.preempted or self.waiting
        if not has_preempted and budget > 0 and wanted and self.policy.may_admit(len(self.running)):
            self._admission.admit(decodes, chunks, budget)
        branching = self._branch(decodes, chunks) if self._groups.with_trunk else []
        if not decodes.sequences and not chunks.sequences:
            return None
        rows = Rows(decodes.sequences + chunks.sequences, decodes.query_lens + chunks.query_lens)
        plan = self._packer.pack(rows, self._swap_space.take())
        if self.waiting.is_shared:
            self.waiting.charge_draws(plan.sequences, plan.samples)
        for group in branching:
            group.fork_tables(self.blocks)
        return plan

    def _schedule_running(self, decodes: Rows, chunks: Rows, budget: int) -> tuple[bool, int]:
        """Give every running sequence its share, by rank, preempting the last groups where blocks run out."""
        sequences: list[Sequence] = []
        query_lens: list[int] = []
        for seq in [seq for group in self.running for seq in group.active]:
            num_tokens = len(seq.token_ids) + seq.num_in_flight
            pending = num_tokens - seq.num_computed_tokens
            if num_tokens >= seq.max_total_tokens or pending == 0:
                continue  # its last token is in flight, or it is a beam that waits for the others
            if pending > budget:
                if budget == 0:
                    break
                pending = budget
            budget -= pending
            sequences.append(seq)
            query_lens.append(pending)
        starts = [seq.num_computed_tokens for seq in sequences]
        ends = [start + n for start, n in zip(starts, query_lens, strict=True)]
        ids = [seq.seq_id for seq in sequences]
        done, has_preempted = 0, False
        while True:
            done += self.blocks.grow_many(ids[done:], ends[done:], starts[done:])
            if done == len(ids):
                break
            has_preempted = True
            victim = self.running[-1]
            self._groups.preempt(victim)
            while sequences and sequences[-1].group is victim:
                for entries in (sequences, query_lens, ids, ends, starts):
                    entries.pop()
            done = min(done, len(ids))
        for seq, query_len in zip(sequences, query_lens, strict=True):
            (decodes if query_len == 1 else chunks).add(seq, query_len)
        return has_preempted, budget

    def _branch(self, decodes: Rows, chunks: Rows) -> list[SequenceGroup]:
        """Where the common tokens of a group end with this step, add a row for each sequence that draws behind them.

        These rows come last: they belong behind the row that computes their token. Returns the groups that branch.
        """
        branching: list[SequenceGroup] = []
        trunks = Rows()
        for rows in (decodes, chunks):
            for at in reversed(range(len(rows))):
                seq = rows.sequences[at]
                ends = seq.num_computed_tokens + rows.query_lens[at] == len(seq.token_ids)
                if ends and seq.group.trunk is seq:
                    trunks.add(*rows.pop(at))
        for trunk, query_len in zip(trunks.sequences, trunks.query_lens, strict=True):
            group = trunk.group
            num_before = len(group.sequences)
            self._groups.with_trunk.remove(group)
            row_owner, *others = group.branch(self._groups.new_seq_id)
            for seq in group.sequences[num_before:]:
                self._packer.add(seq, group.num_logprobs)
            chunks.add(row_owner, query_len)
            for seq in others:
                chunks.add(seq, 0)
            branching.append(group)
        return branching

    # ------------------------------------------------------------------ what became of a step

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Take over what a step drew: append, register full blocks, finish. Rows of sequences that ended meanwhile are dropped."""
        return self._results.commit(plan, result)

    def fail_step(self, plan: StepPlan, error: Exception) -> list[TokenOutput]:
        """End every group that the step was to compute; those it was only to swap are recomputed, the others go on."""
        return self._results.fail_step(plan, error)

    def retry_step(self, plan: StepPlan) -> None:
        """Take back a step that failed through no fault of its unfinished groups: they are recomputed."""
        self._results.retry_step(plan)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_waiting_tokens=self.waiting.num_tokens,
            num_preempted=len(self.preempted),
            num_swapped=sum(group.status is GroupStatus.SWAPPED for group in self.preempted),
            block_size=self.blocks.block_size,
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free_blocks,
            num_cached_blocks=self.blocks.num_cached_blocks,
            num_pinned_blocks=self._pinned.num_blocks,
            num_host_blocks=self.blocks.num_host_blocks,
            num_free_host_blocks=self.blocks.num_free_host_blocks,
            prefix_cache_queries_total=self._admission.num_prefix_queries,
            prefix_cache_hits_total=self._admission.num_prefix_hits,
            preemptions_total=self._groups.num_preemptions,
            swapped_out_blocks_total=self._swap_space.num_blocks_out,
            swapped_in_blocks_total=self._swap_space.num_blocks_in,
            prefix_cache_evictions_total=self.blocks.num_evictions,
            prompt_tokens_total=self._results.num_prompt_tokens,
            generation_tokens_total=self._results.num_generated_tokens,
            steps_total=self._packer.num_steps,
            finished_total=dict(self._groups.num_finished),
        )
