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

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from pagedcore._core import copy_tokens
from pagedcore.engine.parameter_values import MAX_LOGIT_BIASES
from pagedcore.engine.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.step_plan import NUM_SAMPLING_COLUMNS, Int32Array, SamplingColumn
from pagedcore.engine.token_rules import ALWAYS, BadWordBans

IN_FLIGHT = -1
EXTRAS_HEADER_SIZE = 8
NUM_PENALTY_COLUMNS = 8
_MAX_EOS_TOKEN_IDS = 64
_SPELLINGS = 2  # of a bad word: with and without a space before it
MAX_BANS = MAX_STOP_TOKEN_IDS + _MAX_EOS_TOKEN_IDS + _SPELLINGS * MAX_BAD_WORDS  # of a row


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


@dataclass(frozen=True)
class FixedExtras:
    """What the extras of a sequence's rows have in every step; made once, as a step has no time for it.

    penalties: [8] int32, see `PenaltyColumn`; row and output tokens are still 0
    biases: [d, 3] int32 and stop_bans: [c, 3] int32, as on the wire, but for the row; the bans hold until `min_tokens` are output
    allowed: [f] int32 token ids
    bad_words: for no token in flight and for one; empty: there are none
    """

    has_penalties: bool
    num_prompt_tokens: int
    penalties: Int32Array
    biases: Int32Array
    allowed: Int32Array
    stop_bans: Int32Array
    min_tokens: int
    bad_words: tuple[BadWordBans, ...]

    @classmethod
    def of(cls, sequence: Sequence) -> FixedExtras | None:
        """Those of a sequence; None if none of its rows ever has extras."""
        params = sequence.request.sampling_params
        if not (params.has_penalties or params.has_token_rules or params.min_tokens > 0):
            return None
        num_prompt_tokens = sequence.num_prompt_tokens if params.repetition_penalty != 1.0 else 0
        penalties = np.zeros(NUM_PENALTY_COLUMNS, np.int32)
        values = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        penalties.view(np.float32)[PenaltyColumn.REPETITION : PenaltyColumn.NUM_PROMPT_TOKENS] = values
        penalties[PenaltyColumn.NUM_PROMPT_TOKENS] = num_prompt_tokens
        pairs = np.array(params.logit_biases).reshape(-1, 2)
        biases = np.zeros((len(pairs), 3), np.int32)
        biases[:, 1], biases[:, 2] = pairs[:, 0], pairs[:, 1].astype(np.float32).view(np.int32)
        words = sequence.request.bad_words
        stop_bans = [(0, token_id, ALWAYS) for token_id in sorted(sequence.stop_token_ids)]
        return cls(
            has_penalties=params.has_penalties,
            num_prompt_tokens=num_prompt_tokens,
            penalties=penalties,
            biases=biases,
            allowed=np.array(params.allowed_token_ids or (), np.int32),
            stop_bans=np.array(stop_bans, np.int32).reshape(-1, 3),
            min_tokens=params.min_tokens,
            bad_words=tuple(BadWordBans.of(words, num_in_flight) for num_in_flight in (0, 1)) if words else (),
        )


# Row of the step, its sequence, its fixed extras, tokens it has output before this step's draw, those in flight included.
ExtrasRow = tuple[int, Sequence, FixedExtras, int]


def pack_extras(rows: list[ExtrasRow], out: Int32Array) -> int:
    """Write the extras of a step into `out`, and return their size: 0 where no row needs any now.

    Until a sequence has output `min_tokens`, its stop and end-of-sequence tokens are banned.
    """
    penalized = [entry for entry in rows if entry[2].has_penalties]
    biases = [(row, fixed.biases) for row, _, fixed, _ in rows if len(fixed.biases)]
    allowed = [(row, fixed.allowed) for row, _, fixed, _ in rows if len(fixed.allowed)]
    bans = [(row, fixed.stop_bans) for row, _, fixed, num_output in rows if num_output < fixed.min_tokens]
    bans += _bad_word_bans(rows)
    if not (penalized or biases or allowed or bans):
        return 0
    at, num_prompt_tokens, num_output_tokens = EXTRAS_HEADER_SIZE, 0, 0
    if penalized:
        size, num_prompt_tokens, num_output_tokens = _write_penalties(penalized, out[at:])
        at += size
    num_biases = _write_tables(biases, out[at:])
    at += 3 * num_biases
    num_allowed_tokens = sum(len(token_ids) for _, token_ids in allowed)
    if allowed:
        lengths = out[at : at + 2 * len(allowed)].reshape(-1, 2)
        lengths[:] = [(row, len(token_ids)) for row, token_ids in allowed]
        at += lengths.size
        np.concatenate([token_ids for _, token_ids in allowed], out=out[at : at + num_allowed_tokens])
        at += num_allowed_tokens
    num_bans = _write_tables(bans, out[at:])
    out[:EXTRAS_HEADER_SIZE] = 0
    header = ExtrasHeader(
        num_penalty_rows=len(penalized),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        num_bans=num_bans,
        num_biases=num_biases,
        num_allowed_rows=len(allowed),
        num_allowed_tokens=num_allowed_tokens,
    )
    out[: len(header)] = header
    return at + 3 * num_bans


def _write_penalties(rows: list[ExtrasRow], out: Int32Array) -> tuple[int, int, int]:
    """Write penalty rows, prompt tokens and output tokens; returns the size of all, and the number of either tokens."""
    size = NUM_PENALTY_COLUMNS * len(rows)
    table = out[:size].reshape(-1, NUM_PENALTY_COLUMNS)
    np.concatenate([fixed.penalties for _, _, fixed, _ in rows], out=out[:size])
    table[:, PenaltyColumn.ROW] = [row for row, _, _, _ in rows]
    table[:, PenaltyColumn.NUM_OUTPUT_TOKENS] = num_output = [num for _, _, _, num in rows]
    token_ids = [sequence.token_ids for _, sequence, _, _ in rows]
    num_prompt = [fixed.num_prompt_tokens for _, _, fixed, _ in rows]
    num_prompt_tokens = copy_tokens(out[size:], token_ids, [0] * len(rows), num_prompt, IN_FLIGHT)
    size += num_prompt_tokens
    starts = [sequence.num_prompt_tokens for _, sequence, _, _ in rows]
    num_output_tokens = copy_tokens(out[size:], token_ids, starts, num_output, IN_FLIGHT)
    return size + num_output_tokens, num_prompt_tokens, num_output_tokens


def _bad_word_bans(rows: list[ExtrasRow]) -> list[tuple[int, Int32Array]]:
    return [
        (row, table)
        for row, sequence, fixed, num_output in rows
        if fixed.bad_words
        for table in fixed.bad_words[num_output - sequence.num_output_tokens].tables(sequence)
    ]


def _write_tables(tables: list[tuple[int, Int32Array]], out: Int32Array) -> int:
    """Write tables [k, 3] one behind the other, with their row in the first column; returns how many lines there are."""
    if not tables:
        return 0
    lengths = [len(table) for _, table in tables]
    section = out[: 3 * sum(lengths)].reshape(-1, 3)
    np.concatenate([table for _, table in tables], out=section)
    section[:, 0] = np.repeat([row for row, _ in tables], lengths)
    return len(section)


def max_extras(max_num_seqs: int, max_model_len: int) -> int:
    """int32 elements that the extras of any step fit into."""
    bans = 3 * MAX_BANS
    rules = 3 * MAX_LOGIT_BIASES + 2 + MAX_ALLOWED_TOKEN_IDS
    return EXTRAS_HEADER_SIZE + max_num_seqs * (NUM_PENALTY_COLUMNS + max_model_len + 1 + rules + bans)
