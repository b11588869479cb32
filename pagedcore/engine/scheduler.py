"""Decides what each step computes: one pass over all sequences under a token budget."""

from __future__ import annotations

import bisect
import itertools
import time
from dataclasses import dataclass

from pagedcore._core import BlockManager
from pagedcore.engine.memory_policy import PAGED, MemoryPolicy
from pagedcore.engine.outputs import (
    EngineStats,
    StepLogprobs,
    TokenLogprobs,
    TokenOutput,
    final_output,
    ranked_outputs,
)
from pagedcore.engine.pinned_prefixes import PinnedPrefixes
from pagedcore.engine.precedence import Shortage, count_victims, rank_of
from pagedcore.engine.sequence import NEVER, FinishReason, Sequence
from pagedcore.engine.sequence_group import GroupStatus, SequenceGroup, blocks_of_group
from pagedcore.engine.step_packer import Rows, StepPacker
from pagedcore.engine.step_plan import Int32Array, StepPlan, StepResult
from pagedcore.engine.swap_space import PreemptionMode, SwapSpace
from pagedcore.engine.telemetry import Recorder, StepTimes, request_record
from pagedcore.engine.waiting_queue import WaitingQueue
from pagedcore.errors import NonFiniteLogitsError, RequestError

WATERMARK = 0.01  # share of the blocks that admission leaves free, so that the newcomer is not preempted at once


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step. Without chunked prefill, `max_num_batched_tokens` must be at least the longest sequence.

    `decode_batch_sizes`: the numbers of rows, ascending, to which steps that only decode are padded, up to max_num_seqs at
    least; empty: no padding. `swap_cost_tokens`: see `KVCacheShape`.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    decode_batch_sizes: tuple[int, ...] = ()
    preemption_mode: PreemptionMode = PreemptionMode.AUTO
    swap_cost_tokens: float = 0.0


class Scheduler:
    """Owns every unfinished request as a group of sequences; continuous batching in the order of the `WaitingQueue`.

    `running` groups own blocks; `running` and `preempted` are in order of their ranks: the most urgent first, then the one
    admitted first. The last of them is preempted first, with all its sequences (section 4.5). While a group is preempted,
    only more urgent ones are admitted, and none in a step in which blocks ran out. The group of the first rank can therefore
    always go on. A waiting group may preempt less urgent ones, where it lacks rows or blocks.

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
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.policy = policy
        self.waiting = WaitingQueue()
        self.preempted: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.num_finished = dict.fromkeys(FinishReason, 0)
        self._recorder = recorder
        self._committed_at = -1.0  # when the step before was taken over; before the first one, no sequence's `token_at`
        self._packer = StepPacker(blocks, config.max_num_seqs, config.decode_batch_sizes, buffers)
        self._swap_space = SwapSpace(blocks, config.preemption_mode, config.swap_cost_tokens)
        self._pinned = PinnedPrefixes(blocks)
        self._seq_ids = itertools.count()
        self._admissions = itertools.count()
        self._watermark_blocks = int(blocks.num_blocks * WATERMARK) if policy.is_paged else 0
        self._num_reserved_rows = 0  # the widths of the running groups
        self._with_trunk: list[SequenceGroup] = []  # running groups whose common tokens are being computed
        self._refused_at: tuple[SequenceGroup, int] | None = None  # group that had no room, and the free blocks then

    # ------------------------------------------------------------------ requests in, requests out

    def check_fits(self, num_prompt_tokens: int, max_total_tokens: int, width: int = 1) -> None:
        """Raise RequestError for a request of `width` sequences that could not finish even with the whole pool to itself."""
        if width > self.config.max_num_seqs:
            raise RequestError(
                f"n, best_of and beam_width must be at most {self.config.max_num_seqs} (max_num_seqs), got {width}"
            )
        if self.policy.is_paged:
            needed, available = blocks_of_group(self.blocks, num_prompt_tokens, max_total_tokens, width), "the pool has"
        elif width == 1:
            needed = self.blocks.blocks_needed(self.policy.most_tokens(max_total_tokens))
            available = "the longest contiguous range of the pool has"
        else:
            raise RequestError(
                f"n, best_of and beam_width must be 1 with kv_policy {self.policy.name!r}, which shares no blocks, got {width}"
            )
        num_blocks = self.blocks.max_blocks_per_sequence - self._pinned.num_blocks
        if needed > num_blocks:
            more = f"up to {max_total_tokens - num_prompt_tokens} more"
            raise RequestError(
                f"prompt of {num_prompt_tokens} tokens with {more if width == 1 else f'{width} times {more}'} needs {needed} "
                f"KV-cache blocks of {self.blocks.block_size} tokens, but {available} {num_blocks}"
                f"{f' beside {self._pinned.num_blocks} pinned ones' if self._pinned.num_blocks else ''}; "
                f"shorten the prompt or lower max_tokens{'' if width == 1 else ' or the number of sequences'}"
            )

    def new_seq_id(self) -> int:
        """An id for a sequence; they grow, and order groups by arrival."""
        return next(self._seq_ids)

    def add(self, group: SequenceGroup) -> None:
        """Queue a new group."""
        self.waiting.add(group)

    def abort(self, group: SequenceGroup, reason: FinishReason = FinishReason.ABORT) -> None:
        """End an unfinished group wherever it is; its blocks are back in the pool on return.

        A launched step may still be writing to them. Steps run in order, so that is over before a later step can use them.
        """
        self._end_group(group, reason)
        group.finish_reason = reason
        for seq in group.sequences:
            seq.finish_reason, seq.valid_from = reason, NEVER

    def end_sequence(self, sequence: Sequence) -> list[TokenOutput]:
        """End one unfinished sequence of a group, with the reason STOP."""
        self._end_sequence(sequence, FinishReason.STOP)
        return self._final_outputs(sequence, [], [])

    def pin(self, sequence: Sequence) -> None:
        """Keep the blocks of a running sequence, all of which are computed by the steps planned so far, for good."""
        self._pinned.pin(sequence, self.new_seq_id())

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting or self.preempted)

    # ------------------------------------------------------------------ planning a step

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or return None when no sequence has anything to compute now."""
        budget = self.config.max_num_batched_tokens
        decodes, chunks = Rows(), Rows()
        if self.waiting and self.policy.is_paged:
            self._make_way()
        has_preempted, budget = self._schedule_running(decodes, chunks, budget)
        wanted = self.preempted or self.waiting
        if not has_preempted and budget > 0 and wanted and self.policy.may_admit(len(self.running)):
            self._admit(decodes, chunks, budget)
        branching = self._branch(decodes, chunks) if self._with_trunk else []
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
            self._preempt(victim)
            while sequences and sequences[-1].group is victim:
                for entries in (sequences, query_lens, ids, ends, starts):
                    entries.pop()
            done = min(done, len(ids))
        for seq, query_len in zip(sequences, query_lens, strict=True):
            (decodes if query_len == 1 else chunks).add(seq, query_len)
        return has_preempted, budget

    def _preempt(self, group: SequenceGroup, *, may_swap: bool = True) -> None:
        """Take a running group's blocks away, until there is room again: they go to the host, or are recomputed then."""
        if may_swap and self._swap_space.swap_out(group):
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

    def _make_way(self) -> None:
        """Preempt less urgent groups for the first one that waits, where that gets it rows and blocks."""
        group = self._next_to_admit()
        if group is None or group.status is not GroupStatus.WAITING:
            return
        num_tokens = group.num_prompt_tokens  # none of them may be in the prefix cache
        needed = blocks_of_group(self.blocks, num_tokens, num_tokens + 2, group.width) + self._watermark_blocks
        shortage = Shortage(
            num_rows=self._num_reserved_rows + group.width - self.config.max_num_seqs,
            num_blocks=min(needed, self.blocks.num_blocks) - self.blocks.num_free_blocks,
        )
        for _ in range(count_victims(group, self.running, shortage, self.blocks)):
            self._preempt(self.running[-1])

    def _next_to_admit(self) -> SequenceGroup | None:
        """The first of the preempted groups, unless a more urgent one waits."""
        waiting = self.waiting.peek()
        if self.preempted and (waiting is None or self.preempted[0].priority <= waiting.priority):
            return self.preempted[0]
        return waiting

    def _admit(self, decodes: Rows, chunks: Rows, budget: int) -> None:
        """Admit groups in order while rows, tokens and blocks last."""
        while budget > 0 and (group := self._next_to_admit()) is not None:
            if self._num_reserved_rows + group.width > self.config.max_num_seqs:
                return
            if group.has_draws_in_flight:
                return  # preempted while a step that draws its next token is running
            if group.status is GroupStatus.SWAPPED:
                # With running groups but no rows there would be no step to carry it out before one of them needs the room.
                if (self.running and not decodes and not chunks) or not self._swap_in(group):
                    return
                continue  # its rows come with the next step, which is free to preempt
            free_blocks = self.blocks.num_free_blocks
            if self.running and self._refused_at is not None:
                refused, free_then = self._refused_at
                if refused is group and free_blocks <= free_then:
                    return  # matching its prefix again would cost its length every step, for nothing
            seq = group.begin()
            num_tokens = len(seq.token_ids)
            self.blocks.add(seq.seq_id)
            cached = 0
            if self.config.enable_prefix_caching:
                # The last token is always computed: its logits are what the sequence waits for.
                cached = self.blocks.match_prefix(seq.seq_id, seq.token_ids, num_tokens - 1, seq.request.cache_salt)
            cached = self._pinned.attach(seq, cached)
            query_len = min(num_tokens - cached, budget)
            if query_len < num_tokens - cached and not self.config.enable_chunked_prefill:
                self.blocks.release(seq.seq_id)
                return
            if not self._has_room(group, seq, cached):
                self.blocks.release(seq.seq_id)
                self._refused_at = (group, free_blocks)
                return
            self._refused_at = None
            if group.status is GroupStatus.WAITING:
                group.num_cached_tokens = cached
                self.num_prefix_queries += num_tokens
                self.num_prefix_hits += cached
            seq.num_computed_tokens = cached
            self._start(group)
            budget -= query_len
            (decodes if query_len == 1 else chunks).add(seq, query_len)

    def _swap_in(self, group: SequenceGroup) -> bool:
        """Bring a group's blocks back, if there is room for them and for going on."""
        wanted = group.num_swapped_blocks + group.blocks_to_go_on(self.blocks) + self._watermark_blocks
        if self.running and wanted > self.blocks.num_free_blocks:
            return False
        if not self._swap_space.swap_in(group):
            return False
        self._start(group)
        return True

    def _has_room(self, group: SequenceGroup, sequence: Sequence, cached: int) -> bool:
        """Take all blocks the policy wants, at least for the tokens there are: a group is admitted whole or not at all."""
        if not self.blocks.grow(sequence.seq_id, self.policy.tokens_to_hold(sequence), cached):
            return False
        return not self.running or (
            self.blocks.num_free_blocks >= self._watermark_blocks + group.blocks_to_branch(self.blocks)
        )

    def _start(self, group: SequenceGroup) -> None:
        """Move a group from its queue to the running ones."""
        if group.status is GroupStatus.WAITING:
            self.waiting.admit(group, group.num_prompt_tokens - group.num_cached_tokens)
            group.rank = (group.priority, next(self._admissions))
        else:
            self.preempted.pop(0)
        group.status = GroupStatus.RUNNING
        if group.scheduled_at is None:
            group.scheduled_at = time.monotonic()
        self._num_reserved_rows += group.width
        for seq in group.sequences:
            self._packer.add(seq, group.num_logprobs)
        if group.trunk is not None:
            group.trunk.slot = group.lead.slot
            self._with_trunk.append(group)
        bisect.insort(self.running, group, key=rank_of)

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
            self._with_trunk.remove(group)
            row_owner, *others = group.branch(self.new_seq_id)
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
        outputs: list[TokenOutput] = []
        token_ids = result.token_ids.tolist()
        step_logprobs = StepLogprobs(result) if result.chosen_logprobs is not None else None
        block_size = self.blocks.block_size
        step_id = plan.step_id
        committed_at, now = self._committed_at, time.monotonic()
        times = StepTimes(now, now - committed_at)
        num_drawn = 0
        for row in plan.beam_rows:
            if token_ids[row] < 0 and step_id >= plan.sequences[row].valid_from:
                outputs.append(self._fail_bad_logits(plan.sequences[row].group))
        for row, (seq, start, n, samples) in enumerate(
            zip(plan.sequences, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.samples, strict=True)
        ):
            if step_id < seq.valid_from:
                continue
            seq.num_in_flight -= samples
            token = token_ids[row]
            group = seq.group
            if samples and token < 0:  # its K/V may be as bad as its logits: nothing of it is registered
                outputs.append(self._fail_bad_logits(group))
                continue
            end = start + n
            if end // block_size > start // block_size and group.status is GroupStatus.RUNNING:
                self.blocks.commit(seq.seq_id, seq.token_ids, end)
            if not samples:
                continue
            seq.token_ids.append(token)
            num_drawn += 1
            if seq.token_at != committed_at:  # else it drew in the step before, as nearly all do
                times.add_irregular(seq)
            seq.token_at = now
            reason = None
            if token in seq.stop_token_ids:
                reason = FinishReason.STOP
            elif len(seq.token_ids) >= seq.max_total_tokens:
                reason = FinishReason.LENGTH
            if reason is None and group.is_plain:
                outputs.append(TokenOutput(group.request_id, seq.index, [token]))
            else:
                outputs += self._outputs(seq, row, token, reason, step_logprobs)
        for row in plan.beam_rows:
            if step_id >= plan.sequences[row].valid_from:
                outputs += self._take_beam(plan.sequences[row], row, result, times)
        self._committed_at = now
        self.num_generated_tokens += num_drawn
        self.num_prompt_tokens += times.num_prompt_tokens
        if self._recorder is not None:
            self._recorder.add_step(times.record(sum(plan.num_scheduled_tokens), num_drawn))
        return outputs

    def _take_beam(self, beam: Sequence, row: int, result: StepResult, times: StepTimes) -> list[TokenOutput]:
        """Take over what a beam's step says of its next token; with the last beam of the group, choose how they go on."""
        group = beam.group
        search = group.search
        assert search is not None and result.top_token_ids is not None and result.top_logprobs is not None
        beam.awaits_choice = False
        times.add_beam(beam)
        candidates = slice(search.num_candidates)
        search.take(beam, result.top_token_ids[row, candidates], result.top_logprobs[row, candidates])
        if not search.is_complete(group.sequences):
            return []
        continuations = search.choose(group.sequences)
        if not continuations:
            self._end_group(group, search.ended[0].reason)
            return ranked_outputs(group)
        self.num_generated_tokens += len(continuations)
        change = group.replace_beams(continuations, self.new_seq_id)
        for parent, child in change.forked:
            self.blocks.fork(parent.seq_id, child.seq_id)
        for dropped in change.dropped:
            dropped.valid_from = NEVER
            self.blocks.release(dropped.seq_id)
        if group.status is GroupStatus.RUNNING:
            for dropped in change.dropped:
                self._packer.remove(dropped)
            for _, child in change.forked:
                self._packer.add(child, group.num_logprobs)
        return []

    def _outputs(
        self, seq: Sequence, row: int, token: int, reason: FinishReason | None, step_logprobs: StepLogprobs | None
    ) -> list[TokenOutput]:
        """End the sequence if there is a reason to, and say what there is to say: nothing yet, where outputs are ranked."""
        group = seq.group
        logprobs: list[TokenLogprobs] = []
        if group.num_logprobs >= 0:
            assert step_logprobs is not None
            logprobs.append(step_logprobs.of_row(row, group.num_logprobs))
            seq.cumulative_logprob += logprobs[0].logprob
        if group.ranks_outputs:
            seq.logprobs += logprobs
        if reason is not None:
            self._end_sequence(seq, reason)
            return self._final_outputs(seq, [token], logprobs)
        return [] if group.ranks_outputs else [TokenOutput(group.request_id, seq.index, [token], logprobs=logprobs)]

    def _final_outputs(self, seq: Sequence, token_ids: list[int], logprobs: list[TokenLogprobs]) -> list[TokenOutput]:
        """The last message of a sequence that has ended, with these new tokens; of ranked outputs, all messages at the end."""
        group = seq.group
        finished = group.status is GroupStatus.FINISHED
        if not group.ranks_outputs:
            return [final_output(seq, token_ids, logprobs, request_finished=finished)]
        group.held.append(seq)
        return ranked_outputs(group) if finished else []

    def _end_sequence(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence, wherever its group is, and with the last one the group."""
        group = seq.group
        seq.finish_reason, seq.valid_from = reason, NEVER
        if len(group.sequences) == 1:
            self._end_group(group, reason)
            return
        if group.trunk is not None:
            self._restart(group)  # the trunk may be in this sequence's blocks
        if group.status in (GroupStatus.RUNNING, GroupStatus.SWAPPED):
            self.blocks.release(seq.seq_id)
        if group.status is GroupStatus.RUNNING:
            self._packer.remove(seq)
        group.sequences.remove(seq)
        group.num_ended_tokens += seq.num_output_tokens

    def _end_group(self, group: SequenceGroup, reason: FinishReason) -> None:
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
            self._recorder.add_request(request_record(group, reason, time.monotonic()))

    def _release(self, group: SequenceGroup) -> None:
        """Give back the blocks that a group owns, of the device or of the host."""
        if group.status in (GroupStatus.RUNNING, GroupStatus.SWAPPED):
            self._swap_space.forget(group)
            for seq_id in group.table_ids:
                self.blocks.release(seq_id)

    def _stop_running(self, group: SequenceGroup) -> None:
        """Take a group off the running ones, and its rows back."""
        for seq in group.sequences:
            self._packer.remove(seq)
        if group.trunk is not None:
            self._with_trunk.remove(group)
        self._num_reserved_rows -= group.width
        self.running.remove(group)

    def _fail_bad_logits(self, group: SequenceGroup) -> TokenOutput:
        return self.fail(group, NonFiniteLogitsError("the model's logits for this request were not finite"))

    def fail(self, group: SequenceGroup, error: Exception) -> TokenOutput:
        """End an unfinished group because of `error`."""
        self.abort(group, FinishReason.ERROR)
        return TokenOutput(group.request_id, 0, [], FinishReason.ERROR, error=error, request_finished=True)

    def fail_step(self, plan: StepPlan, error: Exception) -> list[TokenOutput]:
        """End every group that the step was to compute; those it was only to swap are recomputed, the others go on."""
        outputs = [self.fail(group, error) for group in _unfinished_groups(plan)]
        self._restart_swapped(plan)
        return outputs

    def retry_step(self, plan: StepPlan) -> None:
        """Take back a step that failed through no fault of its unfinished groups: they are recomputed."""
        for group in _unfinished_groups(plan):
            self._restart(group)
        self._restart_swapped(plan)

    def _restart_swapped(self, plan: StepPlan) -> None:
        for group in plan.swapped:
            if group.status is not GroupStatus.FINISHED and plan.step_id >= group.restarted_at:
                self._restart(group)

    def _restart(self, group: SequenceGroup) -> None:
        """Have an unfinished group recomputed; what launched steps draw for it is dropped."""
        if group.status is GroupStatus.RUNNING:
            self._preempt(group, may_swap=False)
        elif group.status is GroupStatus.SWAPPED:
            self._release(group)
            group.status = GroupStatus.PREEMPTED
        group.restart()
        self._drop_in_flight(group)

    def _drop_in_flight(self, group: SequenceGroup) -> None:
        """Have what launched steps say of a group dropped."""
        group.restarted_at = self._packer.num_steps
        for seq in group.sequences:
            seq.num_in_flight = 0
            seq.valid_from = group.restarted_at

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
            prefix_cache_queries_total=self.num_prefix_queries,
            prefix_cache_hits_total=self.num_prefix_hits,
            preemptions_total=self.num_preemptions,
            swapped_out_blocks_total=self._swap_space.num_blocks_out,
            swapped_in_blocks_total=self._swap_space.num_blocks_in,
            prefix_cache_evictions_total=self.blocks.num_evictions,
            prompt_tokens_total=self.num_prompt_tokens,
            generation_tokens_total=self.num_generated_tokens,
            steps_total=self._packer.num_steps,
            finished_total=dict(self.num_finished),
        )


def _unfinished_groups(plan: StepPlan) -> list[SequenceGroup]:
    """The groups that the step still concerns."""
    groups = dict.fromkeys(seq.group for seq in plan.sequences)
    return [
        group for group in groups if group.status is not GroupStatus.FINISHED and plan.step_id >= group.restarted_at
    ]
