"""Decides what each step computes: one pass over all sequences under a token budget."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pagedcore._core import BlockManager
from pagedcore.engine.outputs import EngineStats, TokenLogprobs, TokenOutput
from pagedcore.engine.sampling_extras import needs_extras, pack_extras, pack_sampling_row
from pagedcore.engine.sequence import FinishReason, Sequence, SequenceStatus
from pagedcore.engine.step_plan import (
    NUM_SAMPLING_COLUMNS,
    Header,
    Int32Array,
    SamplingColumn,
    StepLayout,
    StepPlan,
    StepResult,
)
from pagedcore.errors import NonFiniteLogitsError, RequestError

_EXTRAS_OFFSET, _NUM_EXTRAS, _ANY_RANDOM, _MAX_LOGPROBS = (
    Header._fields.index(name) for name in ("extras_offset", "num_extras", "any_random", "max_logprobs")
)
_PADDING_SAMPLING = np.array([-1 if c is SamplingColumn.NUM_LOGPROBS else 0 for c in SamplingColumn], np.int32)
WATERMARK = 0.01  # share of the blocks that admission leaves free, so that the newcomer is not preempted at once


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step. Without chunked prefill, `max_num_batched_tokens` must be at least the longest sequence.

    `decode_batch_sizes`: the numbers of rows, ascending, to which steps that only decode are padded, up to max_num_seqs at
    least; empty: no padding.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    decode_batch_sizes: tuple[int, ...] = ()


@dataclass
class _Rows:
    """The rows of the step being planned, as parallel lists, one-token rows apart from longer ones."""

    sequences: list[Sequence] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)

    def add(self, sequence: Sequence, query_len: int) -> None:
        self.sequences.append(sequence)
        self.query_lens.append(query_len)


class Scheduler:
    """Owns every unfinished sequence; continuous batching, first come, first served.

    `running` sequences own blocks and are in order of arrival; `waiting` ones own none. A preempted sequence returns to
    the front of `waiting`, loses its blocks and is recomputed later (section 4.5); the latest arrival is preempted
    first, and nothing is admitted in a step that had to preempt. The oldest sequence can therefore always go on.

    A sequence has tokens and computed tokens; a step computes some of the difference. Prompts, their chunks, decodes
    and recomputation are this one case. `schedule` may be called before the step before has been committed: what that
    step draws is in flight then, and the plan refers to it by row.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, buffers: list[Int32Array]) -> None:
        self.config = config
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_preempted = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._buffers = buffers
        self._watermark_blocks = int(blocks.num_blocks * WATERMARK)
        self._sampling_table = np.zeros((config.max_num_seqs, NUM_SAMPLING_COLUMNS), dtype=np.int32)
        self._free_slots = list(range(config.max_num_seqs))
        self._num_with_extras = 0
        self._refused_at: tuple[int, int] | None = None  # sequence that had no room, and the free blocks there were

    # ------------------------------------------------------------------ requests in, requests out

    def check_fits(self, num_prompt_tokens: int, max_total_tokens: int) -> None:
        """Raise RequestError for a request that could not finish even with the whole pool to itself."""
        needed = self.blocks.blocks_needed(max_total_tokens - 1)  # the last token drawn is never written
        if needed > self.blocks.num_blocks:
            raise RequestError(
                f"prompt of {num_prompt_tokens} tokens with up to {max_total_tokens - num_prompt_tokens} more needs {needed} "
                f"KV-cache blocks of {self.blocks.block_size} tokens, but the pool has {self.blocks.num_blocks}; "
                "shorten the prompt or lower max_tokens"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence, reason: FinishReason = FinishReason.ABORT) -> None:
        """End an unfinished sequence wherever it is; its blocks are back in the pool on return.

        A launched step may still be writing to them. Steps run in order, so that is over before a later step can use them.
        """
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
            self.num_preempted -= sequence.status is SequenceStatus.PREEMPTED
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def unfinished(self) -> Iterable[Sequence]:
        return [*self.running, *self.waiting]

    # ------------------------------------------------------------------ planning a step

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or return None when no sequence has anything to compute now."""
        budget = self.config.max_num_batched_tokens
        decodes, chunks = _Rows(), _Rows()
        preempted, budget = self._schedule_running(decodes, chunks, budget)
        if not preempted and self.waiting and budget > 0:
            self._admit(decodes, chunks, budget)
        if not decodes.sequences and not chunks.sequences:
            return None
        return self._build_plan(decodes.sequences + chunks.sequences, decodes.query_lens + chunks.query_lens)

    def _schedule_running(self, decodes: _Rows, chunks: _Rows, budget: int) -> tuple[bool, int]:
        """Give every running sequence its share, oldest first, preempting the latest where blocks run out."""
        sequences: list[Sequence] = []
        query_lens: list[int] = []
        for seq in self.running:
            num_tokens = len(seq.token_ids) + seq.num_in_flight
            pending = num_tokens - seq.num_computed_tokens
            if num_tokens >= seq.max_total_tokens:
                continue  # its last token is in flight
            if pending > budget:
                if budget == 0:
                    break
                pending = budget
            budget -= pending
            sequences.append(seq)
            query_lens.append(pending)
        ends = [seq.num_computed_tokens + n for seq, n in zip(sequences, query_lens, strict=True)]
        ids = [seq.seq_id for seq in sequences]
        done, preempted = 0, False
        while True:
            done += self.blocks.grow_many(ids[done:], ends[done:])
            if done == len(ids):
                break
            preempted = True
            victim = self.running.pop()
            self._preempt(victim)
            if victim is sequences[-1]:
                for entries in (sequences, query_lens, ids, ends):
                    entries.pop()
        for seq, query_len in zip(sequences, query_lens, strict=True):
            (decodes if query_len == 1 else chunks).add(seq, query_len)
        return preempted, budget

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks away; it is recomputed from its tokens when there is room again."""
        self._release(sequence)
        sequence.status = SequenceStatus.PREEMPTED
        sequence.num_computed_tokens = 0
        self.num_preemptions += 1
        self.num_preempted += 1
        self.waiting.appendleft(sequence)

    def _admit(self, decodes: _Rows, chunks: _Rows, budget: int) -> None:
        """Admit waiting sequences in order while rows, tokens and blocks last."""
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if seq.num_in_flight:
                return  # preempted while a step that draws its next token is running
            free_blocks = self.blocks.num_free_blocks
            if self.running and self._refused_at is not None:
                refused, free_then = self._refused_at
                if refused == seq.seq_id and free_blocks <= free_then:
                    return  # matching its prefix again would cost its length every step, for nothing
            num_tokens = len(seq.token_ids)
            self.blocks.add(seq.seq_id)
            cached = 0
            if self.config.enable_prefix_caching:
                # The last token is always computed: its logits are what the sequence waits for.
                cached = self.blocks.match_prefix(seq.seq_id, seq.token_ids, num_tokens - 1, seq.request.cache_salt)
            query_len = min(num_tokens - cached, budget)
            if query_len < num_tokens - cached and not self.config.enable_chunked_prefill:
                self.blocks.release(seq.seq_id)
                return
            if not self._has_room(seq, num_tokens, cached):
                self.blocks.release(seq.seq_id)
                self._refused_at = (seq.seq_id, free_blocks)
                return
            self._refused_at = None
            self.num_preempted -= seq.status is SequenceStatus.PREEMPTED
            self.waiting.popleft()
            if seq.status is SequenceStatus.WAITING:
                seq.num_cached_tokens = cached
                self.num_prefix_queries += num_tokens
                self.num_prefix_hits += cached
            self._start(seq, cached)
            budget -= query_len
            (decodes if query_len == 1 else chunks).add(seq, query_len)

    def _has_room(self, sequence: Sequence, num_tokens: int, cached: int) -> bool:
        """Take all blocks of the tokens the sequence has: a sequence is admitted whole or not at all."""
        if not self.blocks.grow(sequence.seq_id, num_tokens, cached):
            return False
        return not self.running or self.blocks.num_free_blocks >= self._watermark_blocks

    def _start(self, sequence: Sequence, cached: int) -> None:
        sequence.status = SequenceStatus.RUNNING
        sequence.num_computed_tokens = cached
        sequence.slot = self._free_slots.pop()
        params = sequence.request.sampling_params
        self._sampling_table[sequence.slot] = pack_sampling_row(params, sequence.seed)
        self._num_with_extras += needs_extras(params)
        self.running.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.seq_id)
        self._free_slots.append(sequence.slot)
        self._num_with_extras -= needs_extras(sequence.request.sampling_params)
        sequence.slot = -1

    # ------------------------------------------------------------------ the packed buffer

    def _build_plan(self, sequences: list[Sequence], query_lens: list[int]) -> StepPlan:
        """Write the step's buffer and move the sequences' counters to where the step will have brought them."""
        num_rows, num_tokens = self._padded_size(len(sequences), sum(query_lens))
        computed = [seq.num_computed_tokens for seq in sequences]
        ends = [start + n for start, n in zip(computed, query_lens, strict=True)]
        width = self.blocks.blocks_needed(max(ends))
        layout = StepLayout(num_tokens, num_rows, width)
        buffer = self._buffers[self.num_steps % len(self._buffers)]
        used = self.blocks.fill_step(
            buffer,
            num_rows=num_rows,
            num_tokens=num_tokens,
            table_width=width,
            seq_ids=[seq.seq_id for seq in sequences],
            num_computed=computed,
            query_lens=query_lens,
            token_ids=[seq.token_ids for seq in sequences],
            last_rows=[seq.last_row for seq in sequences],
        )
        samples: list[bool] = []
        draws: list[int] = []
        for row, seq in enumerate(sequences):
            total = len(seq.token_ids) + seq.num_in_flight
            draws.append(total - seq.num_prompt_tokens)
            seq.num_computed_tokens = end = ends[row]
            if end == total:
                samples.append(True)
                seq.num_in_flight += 1
                seq.last_row = row
            else:
                samples.append(False)
        used = self._fill_sampling(buffer, layout, used, sequences, draws)
        plan = StepPlan(self.num_steps, sequences, computed, query_lens, samples, buffer, used)
        self.num_steps += 1
        return plan

    def _padded_size(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """The rows and tokens of a step with its padding."""
        sizes = self.config.decode_batch_sizes
        if not sizes or num_tokens > num_rows:
            return num_rows, num_tokens
        padded = sizes[bisect_left(sizes, num_rows)]
        return padded, padded

    def _fill_sampling(
        self, buffer: Int32Array, layout: StepLayout, used: int, sequences: list[Sequence], draws: list[int]
    ) -> int:
        """Write the sampling section and the extras; return where the buffer ends."""
        end = layout.sampling + layout.num_rows * NUM_SAMPLING_COLUMNS
        rows = buffer[layout.sampling : end].reshape(layout.num_rows, NUM_SAMPLING_COLUMNS)
        rows[len(sequences) :] = _PADDING_SAMPLING
        rows = rows[: len(sequences)]
        np.take(self._sampling_table, [seq.slot for seq in sequences], axis=0, out=rows, mode="clip")
        rows[:, SamplingColumn.DRAW_INDEX] = draws
        buffer[_ANY_RANDOM] = rows[:, SamplingColumn.TEMPERATURE].any()
        buffer[_MAX_LOGPROBS] = rows[:, SamplingColumn.NUM_LOGPROBS].max()
        if self._num_with_extras:
            extras = pack_extras(
                [
                    (row, seq, draws[row])
                    for row, seq in enumerate(sequences)
                    if needs_extras(seq.request.sampling_params, draws[row])
                ]
            )
            if extras is not None:
                buffer[used : used + len(extras)] = extras
                buffer[_EXTRAS_OFFSET], buffer[_NUM_EXTRAS] = used, len(extras)
                used += len(extras)
        return used

    # ------------------------------------------------------------------ what became of a step

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Take over what a step drew: append, register full blocks, finish. Rows of sequences that ended meanwhile are dropped."""
        outputs: list[TokenOutput] = []
        token_ids = result.token_ids.tolist()
        block_size = self.blocks.block_size
        finished = False
        for row, (seq, start, n, samples) in enumerate(
            zip(plan.sequences, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.samples, strict=True)
        ):
            seq.num_in_flight -= samples
            if seq.status is SequenceStatus.FINISHED:
                continue
            token = token_ids[row]
            if samples and token < 0:  # its K/V may be as bad as its logits: nothing of it is registered
                outputs.append(
                    self.fail(seq, NonFiniteLogitsError("the model's logits for this request were not finite"))
                )
                continue
            end = start + n
            if end // block_size > start // block_size and seq.status is SequenceStatus.RUNNING:
                self.blocks.commit(seq.seq_id, seq.token_ids, end)
            if start < seq.num_prompt_tokens:
                self.num_prompt_tokens += min(end, seq.num_prompt_tokens) - start
            if not samples:
                continue
            seq.token_ids.append(token)
            self.num_generated_tokens += 1
            reason = None
            if token in seq.stop_token_ids:
                reason = FinishReason.STOP
            elif len(seq.token_ids) >= seq.max_total_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                finished = True
                self._finish(seq, reason)
            outputs.append(self._output(seq, row, token, reason, result))
        if finished:
            self.running = [seq for seq in self.running if seq.status is SequenceStatus.RUNNING]
        return outputs

    def _output(
        self, seq: Sequence, row: int, token: int, reason: FinishReason | None, result: StepResult
    ) -> TokenOutput:
        request = seq.request
        wanted = request.sampling_params.logprobs
        if reason is None and wanted is None:
            return TokenOutput(request.request_id, 0, [token])
        stop_reason = token if reason is FinishReason.STOP and token in request.sampling_params.stop_token_ids else None
        logprobs = None if wanted is None else [_row_logprobs(result, row, wanted)]
        return TokenOutput(request.request_id, 0, [token], reason, stop_reason, logprobs, seq.num_cached_tokens)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence whose last token has been drawn. It may have been preempted while that step ran."""
        if sequence.status is SequenceStatus.RUNNING:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
            self.num_preempted -= 1
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason

    def fail(self, sequence: Sequence, error: Exception) -> TokenOutput:
        """End an unfinished sequence because of `error`."""
        self.abort(sequence, FinishReason.ERROR)
        return TokenOutput(sequence.request.request_id, 0, [], FinishReason.ERROR, error=error)

    def fail_step(self, plan: StepPlan, error: Exception) -> list[TokenOutput]:
        """End every unfinished sequence of a step that failed; the others go on."""
        for seq, samples in zip(plan.sequences, plan.samples, strict=True):
            seq.num_in_flight -= samples
        return [self.fail(seq, error) for seq in plan.sequences if seq.status is not SequenceStatus.FINISHED]

    def retry_step(self, plan: StepPlan) -> None:
        """Take back a step that failed through no fault of its unfinished sequences: they are recomputed."""
        for seq, samples in zip(plan.sequences, plan.samples, strict=True):
            seq.num_in_flight -= samples
        for seq in reversed(plan.sequences):
            if seq.status is SequenceStatus.RUNNING:
                self.running.remove(seq)
                self._preempt(seq)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting) - self.num_preempted,
            num_preempted=self.num_preempted,
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free_blocks,
            num_cached_blocks=self.blocks.num_cached_blocks,
            prefix_cache_queries_total=self.num_prefix_queries,
            prefix_cache_hits_total=self.num_prefix_hits,
            preemptions_total=self.num_preemptions,
            prompt_tokens_total=self.num_prompt_tokens,
            generation_tokens_total=self.num_generated_tokens,
            steps_total=self.num_steps,
        )


def _row_logprobs(result: StepResult, row: int, wanted: int) -> TokenLogprobs:
    assert result.chosen_logprobs is not None and result.chosen_ranks is not None
    assert result.top_logprobs is not None and result.top_token_ids is not None
    top = zip(result.top_token_ids[row, :wanted].tolist(), result.top_logprobs[row, :wanted].tolist(), strict=True)
    return TokenLogprobs(float(result.chosen_logprobs[row]), int(result.chosen_ranks[row]), list(top))
