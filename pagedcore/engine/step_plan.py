"""What one step computes, and the layout of the packed int32 buffer that carries it to the executor."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pagedcore.engine.sequence import Sequence
    from pagedcore.engine.sequence_group import SequenceGroup

Int32Array = npt.NDArray[np.int32]

HEADER_SIZE = 16


class SamplingColumn(IntEnum):
    """Columns of a row of sampling parameters; see kernels/ops.h. Floats are stored as their bit patterns."""

    TEMPERATURE = 0
    TOP_K = 1
    TOP_P = 2
    MIN_P = 3
    SEED_LOW = 4
    SEED_HIGH = 5
    DRAW_INDEX = 6
    NUM_LOGPROBS = 7


NUM_SAMPLING_COLUMNS = len(SamplingColumn)


@dataclass(frozen=True)
class StepLayout:
    """Where the sections of a packed step buffer lie (offsets in int32 elements), for given sizes.

    `num_tokens` and `num_rows` are padded sizes, `table_width` the block-table columns. Sections, in this order:

    header          [16]      see `Header`
    token_ids       [T]       an id, or -1 - r: the token that row r of the previous step drew
    positions       [T]
    slot_mapping    [T]       -1 in padding
    query_start_loc [R + 1]   padding rows are empty, and rows that draw from the last token of the row before them
    seq_lens        [R]       tokens in the context after this step; 0 in rows without tokens
    block_tables    [R, W]    unused entries are 0
    sampling        [R, 8]    kernels/ops.h: SamplingColumn
    copies          [C, 2]    copy-on-write: source block, destination block; done before anything is written
    swap_outs       [O, 2]    device block, host block; done before the copies
    swap_ins        [I, 2]    host block, device block; done after swap_outs, before the copies
    prompt_sources  [Q]       tokens of this step (their indices) whose logits say how likely the next prompt token was
    prompt_targets  [Q]       those next prompt tokens' ids; both only when a row wants its prompt's log probabilities
    extras          [E]       see `pagedcore/engine/sampling_extras.py`; only when a row uses penalties, bans or biases
    """

    num_tokens: int
    num_rows: int
    table_width: int

    @property
    def token_ids(self) -> int:
        return HEADER_SIZE

    @property
    def positions(self) -> int:
        return self.token_ids + self.num_tokens

    @property
    def slot_mapping(self) -> int:
        return self.positions + self.num_tokens

    @property
    def query_start_loc(self) -> int:
        return self.slot_mapping + self.num_tokens

    @property
    def seq_lens(self) -> int:
        return self.query_start_loc + self.num_rows + 1

    @property
    def block_tables(self) -> int:
        return self.seq_lens + self.num_rows

    @property
    def sampling(self) -> int:
        return self.block_tables + self.num_rows * self.table_width

    @property
    def copies(self) -> int:
        return self.sampling + self.num_rows * NUM_SAMPLING_COLUMNS


class Header(NamedTuple):
    """The 16 first elements of the packed buffer."""

    num_tokens: int  # padded
    num_rows: int  # padded
    table_width: int
    num_real_tokens: int
    num_real_rows: int
    max_query_len: int
    max_seq_len: int
    num_copies: int
    extras_offset: int  # 0: none
    num_extras: int
    any_random: int  # 1 when a row has a temperature above 0
    max_logprobs: int  # -1: no row wants log probabilities; else the largest number wanted
    num_swap_outs: int = 0
    num_swap_ins: int = 0
    num_prompt_targets: int = 0
    max_prompt_logprobs: int = 0  # the largest number of most likely tokens that a row wants beside its prompt's

    @property
    def prompt_sources_offset(self) -> int:
        """Where the sections about prompt tokens begin."""
        num_pairs = self.num_copies + self.num_swap_outs + self.num_swap_ins
        return StepLayout(self.num_tokens, self.num_rows, self.table_width).copies + 2 * num_pairs

    @property
    def is_decode(self) -> bool:
        """Whether every row computes one token. Padded sizes do not tell: they can be equal where rows compute none."""
        return self.max_query_len == 1 and self.num_real_tokens == self.num_real_rows


@dataclass(frozen=True)
class Swaps:
    """Blocks to copy between device and host before anything else in a step, for these groups.

    outs: [O, 2] int32, device block and host block. ins: [I, 2] int32, host block and device block. First the ones, then
    the others.
    """

    outs: Int32Array
    ins: Int32Array
    groups: list[SequenceGroup]


class PromptSpan(NamedTuple):
    """Prompt tokens [begin, end) of a group, whose log probabilities a step finds."""

    group: SequenceGroup
    begin: int
    end: int


@dataclass(frozen=True)
class StepPlan:
    """One step, decided: row i computes tokens [c, c + n) of sequences[i], c = num_computed_tokens[i], n = num_scheduled_tokens[i].

    Rows that compute one token come first. A row with n = 0 draws from the last token of the row before it: sequences that
    are equal up to there are computed once. `samples[i]` says whether the row ends at its sequence's last token, so that
    the token drawn there counts; beams draw none, `beam_rows` are those that end at a beam's last token. `swapped` are the
    groups whose blocks move between device and host first. `prompt_spans` are the prompt tokens whose log probabilities the step
    finds, in the order of `StepResult.prompt_logprobs`. `buffer` is the packed form (`used` elements of it), valid until
    the step after the next one is planned; the executor reads nothing else.
    """

    step_id: int
    sequences: list[Sequence]
    num_computed_tokens: list[int]
    num_scheduled_tokens: list[int]
    samples: list[bool]
    buffer: Int32Array
    used: int
    beam_rows: list[int] = field(default_factory=list)
    swapped: list[SequenceGroup] = field(default_factory=list)
    prompt_spans: list[PromptSpan] = field(default_factory=list)


@dataclass(frozen=True)
class LogprobArrays:
    """Log probabilities of given tokens at `num` positions, and of the k most likely tokens there, descending.

    chosen_logprobs [num] float32 (NaN: the logits were not finite), chosen_ranks [num] int32 (1: most likely),
    top_logprobs [num, k] float32, top_token_ids [num, k] int32
    """

    chosen_logprobs: npt.NDArray[np.float32]
    chosen_ranks: Int32Array
    top_logprobs: npt.NDArray[np.float32]
    top_token_ids: Int32Array


@dataclass(frozen=True)
class StepResult:
    """What a step drew, row by row. Rows that do not sample hold values without meaning, but for a token id of -1.

    token_ids: [num_rows] int32, -1 in a row whose logits were not finite (its request fails, the rest go on)
    With log probabilities: chosen_logprobs [num_rows] float32, chosen_ranks [num_rows] int32 (1: most likely),
    top_logprobs [num_rows, k] float32 and top_token_ids [num_rows, k] int32, descending, k = Header.max_logprobs.
    prompt_logprobs: of the plan's `prompt_spans`, one behind the other, k = Header.max_prompt_logprobs; None: there are none.
    """

    token_ids: Int32Array
    chosen_logprobs: npt.NDArray[np.float32] | None = None
    chosen_ranks: Int32Array | None = None
    top_logprobs: npt.NDArray[np.float32] | None = None
    top_token_ids: Int32Array | None = None
    prompt_logprobs: LogprobArrays | None = None
