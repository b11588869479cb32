"""What draws with penalties, biases, bans and log probabilities allocate, allocated before anyone counts what is left."""

from __future__ import annotations

from array import array
from dataclasses import replace

import numpy as np
import torch

from pagedcore import ops
from pagedcore.engine.parameter_values import MAX_LOGIT_BIASES
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_extras import MAX_BANS, ExtrasRow, FixedExtras, max_extras, pack_extras
from pagedcore.engine.sampling_params import MAX_ALLOWED_TOKEN_IDS, SamplingParams
from pagedcore.engine.sequence import Sequence
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
    longest = -(-num_tokens // num_rows)
    token_ids = np.arange(max(longest, MAX_LOGIT_BIASES, MAX_BANS, MAX_ALLOWED_TOKEN_IDS), dtype=np.int32) % vocab_size
    table = np.zeros((len(token_ids), 3), np.int32)
    table[:, 1] = token_ids
    rows: list[ExtrasRow] = []
    for row in range(num_rows):
        share = (row + 1) * num_tokens // num_rows - row * num_tokens // num_rows
        num_output = share // 2
        request = Request(str(row), token_ids[: share - num_output].tolist(), SamplingParams(repetition_penalty=1.1))
        sequence = Sequence(row, request, share, frozenset(), 0, token_ids=array("i", token_ids[:share].tolist()))
        fixed = FixedExtras.of(sequence)
        assert fixed is not None
        fixed = replace(
            fixed,
            biases=table[:MAX_LOGIT_BIASES],
            allowed=token_ids[:MAX_ALLOWED_TOKEN_IDS],
            stop_bans=table[:MAX_BANS],
            min_tokens=num_output + 1,
        )
        rows.append((row, sequence, fixed, num_output))
    out = np.zeros(max_extras(num_rows, longest), np.int32)
    return out[: pack_extras(rows, out)]
