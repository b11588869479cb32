"""A step's packed buffer on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedcore import _kernels
from pagedcore.ops.border import addresses, fit, refuse, require_cuda, run


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


def enqueue_step(
    packed: Tensor,
    host_packed: Tensor,
    used: int,
    graph: int,
    host_tokens: Tensor,
    tokens: Tensor,
    num_rows: int,
    event: int,
    stream: int,
) -> None:
    """Enqueue a captured step on a stream, without giving the interpreter lock up.

    Copies `used` elements of host_packed to packed, launches the graph (a cudaGraphExec_t), copies num_rows of its tokens to
    host_tokens, and records the event (a cudaEvent_t). All int32, contiguous; the host's tensors are pinned.
    """
    if not (
        used <= min(len(packed), len(host_packed))
        and num_rows <= min(len(tokens), len(host_tokens))
        and fit(torch.int32, True, packed, tokens)
        and fit(torch.int32, False, host_packed, host_tokens)
    ):
        tensors = {"packed": packed, "host_packed": host_packed, "host_tokens": host_tokens, "tokens": tokens}
        rule = "contiguous int32 tensors, two on a GPU and two on the host, that hold the step"
        refuse("enqueue_step", rule, **tensors, used=used, num_rows=num_rows)
    require_cuda()
    targets = (packed.data_ptr(), host_packed.data_ptr(), 4 * used, graph, host_tokens.data_ptr(), tokens.data_ptr())
    _kernels.cuda.enqueue_step(*targets, 4 * num_rows, event, stream)
