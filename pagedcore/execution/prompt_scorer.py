"""The log probabilities of prompt tokens: what a step's hidden states say of the tokens that come next in the prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pagedcore import ops
from pagedcore.engine.step_plan import Header, LogprobArrays


def prompt_logprobs(
    logits_at: Callable[[torch.Tensor], torch.Tensor], buffer: torch.Tensor, header: Header, max_rows: int
) -> LogprobArrays:
    """Those of a step's `prompt_targets`, of which it has some. Does not wait for the device.

    logits_at: from the indices [num] int32, num at most `max_rows`, of tokens of the step to their logits [num, vocab_size]
    float32, which are in the same memory every time.
    buffer: int32, the step's packed buffer, and `header` its header.
    The result is on the host, once the device is done: the logits of a whole prompt would be too much to hold at once, and
    so may be what is kept of them.
    """
    count, num_top = header.num_prompt_targets, header.max_prompt_logprobs
    begin = header.prompt_sources_offset
    sources, targets = buffer[begin : begin + 2 * count].view(2, count)
    results = [
        torch.empty(shape, dtype=dtype, pin_memory=buffer.is_cuda)
        for shape, dtype in (
            ((count,), torch.float32),
            ((count,), torch.int32),
            ((count, num_top), torch.float32),
            ((count, num_top), torch.int32),
        )
    ]
    for at in range(0, count, max_rows):
        rows = slice(at, at + max_rows)
        logits = logits_at(sources[rows])
        for result, part in zip(results, ops.logprobs(logits, targets[rows], num_top), strict=True):
            result[rows].copy_(part, non_blocking=True)
    return LogprobArrays(*(result.numpy() for result in results))
