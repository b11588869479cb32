"""What draws with penalties, biases, bans and log probabilities allocate, allocated before anyone counts what is left."""

from __future__ import annotations

import numpy as np
import torch

from pagedcore import ops
from pagedcore.engine.parameter_values import MAX_LOGIT_BIASES
from pagedcore.engine.sampling_extras import (
    EXTRAS_HEADER_SIZE,
    MAX_BANS,
    NUM_PENALTY_COLUMNS,
    ExtrasHeader,
    PenaltyColumn,
)
from pagedcore.engine.sampling_params import MAX_ALLOWED_TOKEN_IDS
from pagedcore.engine.step_plan import NUM_SAMPLING_COLUMNS, Int32Array
from pagedcore.execution.sampler import Extras, apply_extras

# Tokens of a step's penalized rows for which there is memory from the start, some hundred bytes for each. Steps with more get
# theirs when they come.
PENALIZED_TOKENS = 1 << 20
_PINNED_AT_ONCE = 12  # results of three steps
_MAX_PINNED = 1 << 22


def allocate_for_draws(logits: torch.Tensor, max_tokens: int, max_model_len: int, max_logprobs: int) -> None:
    """Draw as the largest steps do, and smaller ones: torch keeps the memory, so that none need be had while serving.

    logits: [max_rows, vocab_size] float32 on a GPU, all of a step; what is in them is lost.
    """
    num_rows = len(logits)
    num_tokens = min(num_rows * max_model_len, PENALIZED_TOKENS)
    divisor = 1
    while divisor <= num_tokens and divisor <= 4**5:  # torch serves small and large requests from different pools
        _draw(logits, num_tokens // divisor, max(1, num_rows // divisor), max_logprobs)
        divisor *= 4
    largest = min(4 * max(num_rows, max_tokens) * max(max_logprobs, 1), _MAX_PINNED)
    sizes = [1 << power for power in range(largest.bit_length() + 1)]  # torch keeps pinned memory by powers of two
    pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes * _PINNED_AT_ONCE]
    del pinned


def _draw(logits: torch.Tensor, num_tokens: int, num_rows: int, max_logprobs: int) -> None:
    """One draw of all rows, of which `num_rows` use everything there is and have `num_tokens` tokens to be penalized."""
    host = torch.from_numpy(largest_extras(num_tokens, num_rows, logits.shape[1]))
    extras = Extras.from_buffer(host.to(logits.device), host)
    processed = logits.clone()
    parameters = torch.zeros(len(logits), NUM_SAMPLING_COLUMNS, dtype=torch.int32, device=logits.device)
    apply_extras(processed, extras, torch.zeros(len(logits), dtype=torch.int32, device=logits.device))
    ops.logprobs(logits, ops.sample(processed, parameters), min(max_logprobs, logits.shape[1]))


def largest_extras(num_tokens: int, num_rows: int, vocab_size: int) -> Int32Array:
    """The extras of a packed buffer whose first `num_rows` rows are penalized, biased, allowed and banned as much as may be."""
    num_rows = min(num_rows, num_tokens)
    header = ExtrasHeader(
        num_penalty_rows=num_rows,
        num_prompt_tokens=num_tokens // 2,
        num_output_tokens=num_tokens - num_tokens // 2,
        num_bans=num_rows * MAX_BANS,
        num_biases=num_rows * MAX_LOGIT_BIASES,
        num_allowed_rows=num_rows,
        num_allowed_tokens=num_rows * MAX_ALLOWED_TOKEN_IDS,
    )
    rows = np.arange(num_rows, dtype=np.int32)

    def shares(total: int) -> Int32Array:
        ends = np.arange(1, num_rows + 1) * total // num_rows
        counts: Int32Array = np.diff(ends, prepend=0).astype(np.int32)
        return counts

    def token_ids(count: int) -> Int32Array:
        ids: Int32Array = np.arange(count, dtype=np.int32) % vocab_size
        return ids

    def table(per_row: int, last: int) -> Int32Array:
        columns = (np.repeat(rows, per_row), token_ids(num_rows * per_row), np.full(num_rows * per_row, last))
        stacked: Int32Array = np.stack(columns, axis=1).astype(np.int32)
        return stacked

    penalties = np.zeros((num_rows, NUM_PENALTY_COLUMNS), np.int32)
    penalties.view(np.float32)[:, PenaltyColumn.REPETITION] = 1.0
    penalties[:, PenaltyColumn.ROW] = rows
    penalties[:, PenaltyColumn.NUM_PROMPT_TOKENS] = shares(header.num_prompt_tokens)
    penalties[:, PenaltyColumn.NUM_OUTPUT_TOKENS] = shares(header.num_output_tokens)
    allowed_rows = np.stack((rows, np.full(num_rows, MAX_ALLOWED_TOKEN_IDS, np.int32)), axis=1)
    sections = (
        np.array([*header, *[0] * (EXTRAS_HEADER_SIZE - len(header))], np.int32),
        penalties,
        token_ids(header.num_prompt_tokens),
        token_ids(header.num_output_tokens),
        table(MAX_LOGIT_BIASES, 0),
        allowed_rows,
        token_ids(header.num_allowed_tokens),
        table(MAX_BANS, 0),
    )
    return np.concatenate([section.ravel() for section in sections])
