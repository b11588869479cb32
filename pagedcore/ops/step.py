"""A step's packed buffer on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

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


class StepEnqueuer:
    """Enqueues captured steps on a stream: each in one call that does not give the interpreter lock up."""

    def __init__(
        self, packed: Tensor, host_packed: Sequence[Tensor], tokens: Tensor, host_tokens: Sequence[Tensor], stream: int
    ) -> None:
        """A step's inputs go from one of host_packed to packed, its tokens from `tokens` to the same one of host_tokens.

        All are contiguous int32 tensors; the host's, of the device's lengths, are pinned. stream: a cudaStream_t.
        """
        require_cuda()
        is_fit = fit(torch.int32, True, packed, tokens) and fit(torch.int32, False, *host_packed, *host_tokens)
        lengths = {len(packed)} == {*map(len, host_packed)} and {len(tokens)} == {*map(len, host_tokens)}
        if not (is_fit and lengths and len(host_packed) == len(host_tokens)):
            rule = "contiguous int32 tensors, two on a GPU and as many of the same lengths on the host for each slot"
            on_host = {"host_packed": host_packed[0], "host_tokens": host_tokens[0]}
            refuse("StepEnqueuer", rule, packed=packed, tokens=tokens, **on_host)
        self._packed, self._tokens, self._stream = packed.data_ptr(), tokens.data_ptr(), stream
        self._host_packed, self._host_tokens = addresses(*host_packed), addresses(*host_tokens)

    def enqueue(self, slot: int, used: int, graph: int, num_rows: int, event: int) -> None:
        """Enqueue the copy of `used` elements, the graph (a cudaGraphExec_t), the copy of num_rows tokens, and the event
        (a cudaEvent_t)."""
        host_packed, host_tokens = self._host_packed[slot], self._host_tokens[slot]
        _kernels.cuda.enqueue_step(
            self._packed, host_packed, 4 * used, graph, host_tokens, self._tokens, 4 * num_rows, event, self._stream
        )
