"""A step's packed buffer on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedcore.ops.border import addresses, fit, refuse, run


def unpack_step(
    packed: Tensor,
    last_token_ids: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    sampling: Tensor,
    num_tokens: int,
    num_rows: int,
) -> None:
    """Spread a packed step buffer to where the step's kernels read it; captured once, it serves every table width.

    packed: the buffer, filled by `StepLayout(num_tokens, num_rows, any width)`. last_token_ids: [max_rows], what the step
    before drew. Written: token_ids [max_tokens], an id -1 - r replaced by last_token_ids[r] (0 where that is negative);
    block_tables [max_rows, max_width], as many columns as the buffer has; sampling [max_rows, 8]. All int32, contiguous.
    """
    if not (
        num_tokens <= len(token_ids)
        and num_rows <= min(len(block_tables), len(sampling), len(last_token_ids))
        and fit(torch.int32, True, packed, last_token_ids, token_ids, block_tables, sampling)
    ):
        tensors = {"packed": packed, "last_token_ids": last_token_ids, "token_ids": token_ids}
        outputs = {"block_tables": block_tables, "sampling": sampling}
        rule = "contiguous int32 tensors on a GPU, with room for the step's tokens and rows"
        refuse("unpack_step", rule, **tensors, **outputs, num_tokens=num_tokens, num_rows=num_rows)
    pointers = addresses(packed, last_token_ids, token_ids, block_tables, sampling)
    run("unpack_step", True, *pointers, num_tokens, num_rows, block_tables.shape[1])
