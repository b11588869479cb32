"""Packs sampling parameters for the step buffer: eight columns for every row, and extras for rows with penalties or bans.

The extras are one int32 array; floats are stored as their bit patterns. Sections, in this order:

    header         [8]     see `ExtrasHeader`
    penalty rows   [P, 8]  see `PenaltyColumn`
    prompt tokens  [A]     of the first penalty row, the second one, ...; only of rows with a repetition penalty
    output tokens  [B]     likewise, of all penalty rows; IN_FLIGHT stands for the last input token of the step's row
    bans           [C, 2]  row, token id

The engine plans a step before the host has read the tokens of the step before. The newest output token of a row may so
be unknown when its extras are packed; on the device it is this step's input token, hence IN_FLIGHT.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from pagedcore.engine.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.step_plan import NUM_SAMPLING_COLUMNS, Int32Array, SamplingColumn

IN_FLIGHT = -1
EXTRAS_HEADER_SIZE = 8
NUM_PENALTY_COLUMNS = 8
_MAX_EOS_TOKEN_IDS = 64
_IN_FLIGHT_TOKEN = np.array([IN_FLIGHT], np.int32)


class ExtrasHeader(NamedTuple):
    """The first elements of the extras; the rest of its 8 elements are 0."""

    num_penalty_rows: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_bans: int


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
    return params.has_penalties or num_output_tokens < params.min_tokens


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


def pack_extras(rows: Iterable[tuple[int, Sequence, int]]) -> Int32Array | None:
    """Pack the extras of a step, or None where no row needs any.

    rows: (row of the step, its sequence, tokens it has output before this step's draw, those in flight included).
    Until a sequence has output `min_tokens`, its stop and end-of-sequence tokens are banned.
    """
    table: list[tuple[int, ...]] = []
    penalties: list[tuple[float, float, float]] = []
    prompts: list[Int32Array] = []
    outputs: list[Int32Array] = []
    bans: list[tuple[int, int]] = []
    for row, sequence, num_output_tokens in rows:
        params = sequence.request.sampling_params
        if num_output_tokens < params.min_tokens:
            bans.extend((row, token_id) for token_id in sorted(sequence.stop_token_ids))
        if params.has_penalties:
            tokens = np.array(sequence.token_ids, np.int32)  # a copy: a view would keep the sequence from growing
            num_prompt_tokens = sequence.num_prompt_tokens if params.repetition_penalty != 1.0 else 0
            prompts.append(tokens[:num_prompt_tokens])
            outputs.append(tokens[sequence.num_prompt_tokens :])
            if num_output_tokens > sequence.num_output_tokens:
                outputs.append(_IN_FLIGHT_TOKEN)
            table.append((row, 0, 0, 0, num_prompt_tokens, num_output_tokens, 0, 0))
            penalties.append((params.repetition_penalty, params.presence_penalty, params.frequency_penalty))
    if not table and not bans:
        return None
    header = np.zeros(EXTRAS_HEADER_SIZE, np.int32)
    sizes = ExtrasHeader(len(table), sum(map(len, prompts)), sum(map(len, outputs)), len(bans))
    header[: len(sizes)] = sizes
    columns = np.array(table, np.int32).reshape(-1, NUM_PENALTY_COLUMNS)
    columns[:, PenaltyColumn.REPETITION : PenaltyColumn.NUM_PROMPT_TOKENS] = (
        np.array(penalties, np.float32).reshape(-1, 3).view(np.int32)
    )
    sections = [header, columns.reshape(-1), *prompts, *outputs, np.array(bans, np.int32).reshape(-1)]
    extras: Int32Array = np.concatenate(sections)
    return extras


def max_extras(max_num_seqs: int, max_model_len: int) -> int:
    """int32 elements that the extras of any step fit into."""
    return EXTRAS_HEADER_SIZE + max_num_seqs * (
        NUM_PENALTY_COLUMNS + max_model_len + 1 + 2 * (MAX_STOP_TOKEN_IDS + _MAX_EOS_TOKEN_IDS)
    )
