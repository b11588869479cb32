"""Writes a planned step into its packed buffer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pagedcore._core import BlockManager
from pagedcore.engine.sampling_extras import FixedExtras, pack_extras, pack_sampling_row
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.step_plan import (
    NUM_SAMPLING_COLUMNS,
    Header,
    Int32Array,
    PromptSpan,
    SamplingColumn,
    StepLayout,
    StepPlan,
    Swaps,
)
from pagedcore.engine.step_sizes import StepSizes

_EXTRAS_OFFSET, _NUM_EXTRAS, _ANY_RANDOM, _MAX_LOGPROBS, _NUM_SWAP_OUTS, _NUM_SWAP_INS = (
    Header._fields.index(name)
    for name in ("extras_offset", "num_extras", "any_random", "max_logprobs", "num_swap_outs", "num_swap_ins")
)
_NUM_PROMPT_TARGETS, _MAX_PROMPT_LOGPROBS = map(Header._fields.index, ("num_prompt_targets", "max_prompt_logprobs"))
_PADDING_SAMPLING = np.array([-1 if c is SamplingColumn.NUM_LOGPROBS else 0 for c in SamplingColumn], np.int32)


@dataclass
class Rows:
    """Rows of the step being planned, as parallel lists. A row without tokens draws from the last token of the row before it."""

    sequences: list[Sequence] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)

    def add(self, sequence: Sequence, query_len: int) -> None:
        self.sequences.append(sequence)
        self.query_lens.append(query_len)

    def pop(self, at: int) -> tuple[Sequence, int]:
        return self.sequences.pop(at), self.query_lens.pop(at)

    def __len__(self) -> int:
        return len(self.sequences)


class StepPacker:
    """Owns the step buffers, which it fills in turn, and the sampling parameters of every running sequence."""

    def __init__(
        self, blocks: BlockManager, max_num_seqs: int, step_sizes: StepSizes, buffers: list[Int32Array]
    ) -> None:
        self.num_steps = 0
        self._blocks = blocks
        self._step_sizes = step_sizes
        self._buffers = buffers
        self._sampling_table = np.zeros((max_num_seqs, NUM_SAMPLING_COLUMNS), dtype=np.int32)
        self._free_slots = list(range(max_num_seqs))
        self._extras: list[FixedExtras | None] = [None] * max_num_seqs  # by slot; None: never any
        self._num_with_extras = 0
        self._num_with_prompt_logprobs = 0

    @property
    def num_free_slots(self) -> int:
        """Rows of the table of sampling parameters that no sequence has."""
        return len(self._free_slots)

    def add(self, sequence: Sequence, num_logprobs: int) -> None:
        """Keep the sampling parameters of a sequence that begins to run; `num_logprobs`: -1 for none."""
        sequence.slot = self._free_slots.pop()
        params = sequence.request.sampling_params
        row = self._sampling_table[sequence.slot]
        row[:] = pack_sampling_row(params, sequence.seed)
        row[SamplingColumn.NUM_LOGPROBS] = num_logprobs
        self._extras[sequence.slot] = fixed = FixedExtras.of(sequence)
        self._num_with_extras += fixed is not None
        self._num_with_prompt_logprobs += params.prompt_logprobs is not None

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that runs no more."""
        self._free_slots.append(sequence.slot)
        self._num_with_extras -= self._extras[sequence.slot] is not None
        self._num_with_prompt_logprobs -= sequence.request.sampling_params.prompt_logprobs is not None
        sequence.slot = -1

    def pack(self, rows: Rows, swaps: Swaps | None) -> StepPlan:
        """Write the step's buffer and move the sequences' counters to where the step will have brought them."""
        sequences, query_lens = rows.sequences, rows.query_lens
        num_rows, num_tokens = self._padded_size(query_lens)
        computed = [seq.num_computed_tokens for seq in sequences]
        ends = [start + n for start, n in zip(computed, query_lens, strict=True)]
        width = self._blocks.blocks_needed(max(ends))
        layout = StepLayout(num_tokens, num_rows, width)
        buffer = self._buffers[self.num_steps % len(self._buffers)]
        used = self._blocks.fill_step(
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
        beam_rows: list[int] = []
        for row, seq in enumerate(sequences):
            total = len(seq.token_ids) + seq.num_in_flight
            draws.append(total - seq.num_prompt_tokens)
            seq.num_computed_tokens = end = ends[row]
            if end != total:
                samples.append(False)
            elif seq.group.search is None:
                samples.append(True)
                seq.num_in_flight += 1
                seq.last_row = row
            else:
                samples.append(False)
                seq.awaits_choice = True
                beam_rows.append(row)
        if swaps is not None:
            for count, pairs in ((_NUM_SWAP_OUTS, swaps.outs), (_NUM_SWAP_INS, swaps.ins)):
                buffer[count] = len(pairs)
                buffer[used : used + pairs.size] = pairs.reshape(-1)
                used += pairs.size
        spans: list[PromptSpan] = []
        if self._num_with_prompt_logprobs:
            spans, used = _fill_prompt_targets(buffer, used, sequences, computed, query_lens)
        used = self._fill_sampling(buffer, layout, used, sequences, draws)
        swapped = [] if swaps is None else swaps.groups
        plan = StepPlan(
            self.num_steps, sequences, computed, query_lens, samples, buffer, used, beam_rows, swapped, spans
        )
        self.num_steps += 1
        return plan

    def _padded_size(self, query_lens: list[int]) -> tuple[int, int]:
        """The rows and tokens of a step with its padding."""
        num_rows, num_tokens = len(query_lens), sum(query_lens)
        return self._step_sizes.padded(num_rows, num_tokens, num_tokens == num_rows and 0 not in query_lens)

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
            extras = self._extras
            rows_with_extras = [
                (row, seq, fixed, draws[row])
                for row, seq in enumerate(sequences)
                if (fixed := extras[seq.slot]) is not None
            ]
            size = pack_extras(rows_with_extras, buffer[used:])
            if size:
                buffer[_EXTRAS_OFFSET], buffer[_NUM_EXTRAS] = used, size
                used += size
        return used


def _fill_prompt_targets(
    buffer: Int32Array, used: int, sequences: list[Sequence], computed: list[int], query_lens: list[int]
) -> tuple[list[PromptSpan], int]:
    """Write which of the step's tokens tell of which prompt tokens; return those, and where the buffer ends."""
    spans: list[PromptSpan] = []
    sources: list[int] = []
    targets: list[int] = []
    num_top = index = 0  # the index of the row's first token
    for seq, start, query_len in zip(sequences, computed, query_lens, strict=True):
        wanted = seq.group.prompt_logprobs
        if wanted is not None:
            begin, end = wanted.missing_from(start, start + query_len)
            if begin < end:
                spans.append(PromptSpan(seq.group, begin, end))
                sources += range(index + begin - 1 - start, index + end - 1 - start)
                targets += seq.request.prompt_token_ids[begin:end]
                num_top = max(num_top, seq.request.sampling_params.prompt_logprobs or 0)
        index += query_len
    count = len(targets)
    buffer[_NUM_PROMPT_TARGETS], buffer[_MAX_PROMPT_LOGPROBS] = count, num_top
    buffer[used : used + count] = sources
    buffer[used + count : used + 2 * count] = targets
    return spans, used + 2 * count
