"""Packs sampling parameters for the step buffer: eight columns for every row, and extras for rows that need more.

The extras are one int32 array; floats are stored as their bit patterns. Sections, in this order:

    header         [8]     see `ExtrasHeader`
    penalty rows   [P, 8]  see `PenaltyColumn`
    prompt tokens  [A]     of the first penalty row, the second one, ...; only of rows with a repetition penalty
    output tokens  [B]     likewise, of all penalty rows; IN_FLIGHT stands for the last input token of the step's row
    biases         [D, 3]  row, token id, float that is added to its logit
    allowed rows   [E, 2]  row, number of its allowed tokens
    allowed tokens [F]     of the first such row, the second one, ...; no other token of these rows may be drawn
    bans           [C, 3]  row, token id, and the last input token of the row that bans it; ALWAYS: whatever that is

The engine plans a step before the host has read the tokens of the step before. The newest output token of a row may so
be unknown when its extras are packed; on the device it is this step's input token, hence IN_FLIGHT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from pagedcore.engine.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.step_plan import NUM_SAMPLING_COLUMNS, Int32Array, SamplingColumn
from pagedcore.engine.token_rules import ALWAYS, bad_word_bans

IN_FLIGHT = -1
EXTRAS_HEADER_SIZE = 8
NUM_PENALTY_COLUMNS = 8
_MAX_EOS_TOKEN_IDS = 64
_SPELLINGS = 2  # of a bad word: with and without a space before it
_IN_FLIGHT_TOKEN = np.array([IN_FLIGHT], np.int32)


class ExtrasHeader(NamedTuple):
    """The first elements of the extras; the rest of its 8 elements are 0."""

    num_penalty_rows: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_bans: int
    num_biases: int
    num_allowed_rows: int
    num_allowed_tokens: int


class PenaltyColumn(IntEnum):
    """Columns of a penalty row; the rest of its 8 elements are 0."""

    ROW = 0
    REPETITION = 1  # float
    PRESENCE = 2  # float
    FREQUENCY = 3  # float
    NUM_PROMPT_TOKENS = 4
    NUM_OUTPUT_TOKENS = 5


def needs_extras(params: SamplingParams, num_output_tokens: int = 0) -> bool:
    """Whether a row that has output this many tokens, those in flight included, needs extras to draw the next one."""
    return params.has_penalties or params.has_token_rules or num_output_tokens < params.min_tokens


def pack_sampling_row(params: SamplingParams, seed: int) -> Int32Array:
    """The [8] int32 sampling columns of a sequence with this 64-bit seed; the draw index is set for each step."""
    row = np.zeros(NUM_SAMPLING_COLUMNS, np.int32)
    floats = row.view(np.float32)
    floats[SamplingColumn.TEMPERATURE] = params.temperature
    row[SamplingColumn.TOP_K] = params.top_k
    floats[SamplingColumn.TOP_P] = params.top_p
    floats[SamplingColumn.MIN_P] = params.min_p
    words = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32)
    row[[SamplingColumn.SEED_LOW, SamplingColumn.SEED_HIGH]] = words.view(np.int32)
    row[SamplingColumn.NUM_LOGPROBS] = -1 if params.logprobs is None else params.logprobs
    return row


@dataclass
class _Sections:
    """The extras of the rows packed so far."""

    penalty_rows: list[tuple[int, ...]] = field(default_factory=list)
    penalties: list[tuple[float, float, float]] = field(default_factory=list)
    prompts: list[Int32Array] = field(default_factory=list)
    outputs: list[Int32Array] = field(default_factory=list)
    biases: list[Int32Array] = field(default_factory=list)  # each [d, 3]
    allowed_rows: list[tuple[int, int]] = field(default_factory=list)
    allowed: list[Int32Array] = field(default_factory=list)
    bans: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, row: int, sequence: Sequence, num_output_tokens: int) -> None:
        """Add what a row needs that has output this many tokens, those in flight included."""
        params = sequence.request.sampling_params
        if params.has_penalties:
            self._add_penalties(row, sequence, num_output_tokens)
        if params.logit_biases:
            pairs = np.array(params.logit_biases)
            biases = np.empty((len(pairs), 3), np.int32)
            biases[:, 0], biases[:, 1] = row, pairs[:, 0]
            biases[:, 2] = pairs[:, 1].astype(np.float32).view(np.int32)
            self.biases.append(biases)
        if params.allowed_token_ids:
            self.allowed_rows.append((row, len(params.allowed_token_ids)))
            self.allowed.append(np.array(params.allowed_token_ids, np.int32))
        if num_output_tokens < params.min_tokens:
            self.bans.extend((row, token_id, ALWAYS) for token_id in sorted(sequence.stop_token_ids))
        if sequence.request.bad_words:
            num_in_flight = num_output_tokens - sequence.num_output_tokens
            bans = bad_word_bans(sequence.request.bad_words, sequence, num_in_flight)
            self.bans.extend((row, token_id, after) for token_id, after in bans)

    def _add_penalties(self, row: int, sequence: Sequence, num_output_tokens: int) -> None:
        params = sequence.request.sampling_params
        tokens = np.array(sequence.token_ids, np.int32)  # a copy: a view would keep the sequence from growing
        num_prompt_tokens = sequence.num_prompt_tokens if params.repetition_penalty != 1.0 else 0
        self.prompts.append(tokens[:num_prompt_tokens])
        self.outputs.append(tokens[sequence.num_prompt_tokens :])
        if num_output_tokens > sequence.num_output_tokens:
            self.outputs.append(_IN_FLIGHT_TOKEN)
        self.penalty_rows.append((row, 0, 0, 0, num_prompt_tokens, num_output_tokens, 0, 0))
        self.penalties.append((params.repetition_penalty, params.presence_penalty, params.frequency_penalty))

    def pack(self) -> Int32Array:
        """The extras in their order on the wire."""
        header = np.zeros(EXTRAS_HEADER_SIZE, np.int32)
        sizes = ExtrasHeader(
            num_penalty_rows=len(self.penalty_rows),
            num_prompt_tokens=sum(map(len, self.prompts)),
            num_output_tokens=sum(map(len, self.outputs)),
            num_bans=len(self.bans),
            num_biases=sum(map(len, self.biases)),
            num_allowed_rows=len(self.allowed_rows),
            num_allowed_tokens=sum(map(len, self.allowed)),
        )
        header[: len(sizes)] = sizes
        columns = np.array(self.penalty_rows, np.int32).reshape(-1, NUM_PENALTY_COLUMNS)
        columns[:, PenaltyColumn.REPETITION : PenaltyColumn.NUM_PROMPT_TOKENS] = (
            np.array(self.penalties, np.float32).reshape(-1, 3).view(np.int32)
        )
        extras: Int32Array = np.concatenate(
            [
                header,
                columns.reshape(-1),
                *self.prompts,
                *self.outputs,
                *(biases.reshape(-1) for biases in self.biases),
                np.array(self.allowed_rows, np.int32).reshape(-1),
                *self.allowed,
                np.array(self.bans, np.int32).reshape(-1),
            ]
        )
        return extras


def pack_extras(rows: Iterable[tuple[int, Sequence, int]]) -> Int32Array | None:
    """Pack the extras of a step, or None where no row needs any.

    rows: (row of the step, its sequence, tokens it has output before this step's draw, those in flight included).
    Until a sequence has output `min_tokens`, its stop and end-of-sequence tokens are banned.
    """
    sections = _Sections()
    for row, sequence, num_output_tokens in rows:
        sections.add(row, sequence, num_output_tokens)
    if not (sections.penalty_rows or sections.bans or sections.biases or sections.allowed_rows):
        return None
    return sections.pack()


def max_extras(max_num_seqs: int, max_model_len: int) -> int:
    """int32 elements that the extras of any step fit into."""
    bans = 3 * (MAX_STOP_TOKEN_IDS + _MAX_EOS_TOKEN_IDS + _SPELLINGS * MAX_BAD_WORDS)
    rules = 3 * MAX_LOGIT_BIASES + 2 + MAX_ALLOWED_TOKEN_IDS
    return EXTRAS_HEADER_SIZE + max_num_seqs * (NUM_PENALTY_COLUMNS + max_model_len + 1 + rules + bans)
