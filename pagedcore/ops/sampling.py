"""Operations on logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedcore.ops.border import addresses, fit, refuse, run

_NUM_SAMPLING_COLUMNS = 8


def sample(logits: Tensor, parameters: Tensor, out: Tensor | None = None) -> Tensor:
    """Draw a token for each row; kernels/ops.h says how.

    logits: [num_rows, vocab_size] float32, rows may be strided; penalties and bans already applied.
    parameters: [num_rows, 8] int32, contiguous (kernels/ops.h: SamplingColumn).
    Returns token ids [num_rows] int32, in `out` where given; -1 for a row whose logits are not finite.
    """
    num_rows, vocab_size = logits.shape
    is_cuda = logits.is_cuda
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if not (
        parameters.shape == (num_rows, _NUM_SAMPLING_COLUMNS)
        and logits.dtype is torch.float32
        and logits.stride(1) == 1
        and out.shape == (num_rows,)
        and fit(torch.int32, is_cuda, parameters, out)
    ):
        expected = f"logits [R, V] float32, parameters [R, {_NUM_SAMPLING_COLUMNS}] and out [R] int32 on one device"
        refuse("sample", expected, logits=logits, parameters=parameters, out=out)
    run("sample", is_cuda, *addresses(logits, parameters, out), logits.stride(0), num_rows, vocab_size)
    return out


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log probabilities of each row's chosen token and of the `num_top` most likely ones.

    logits: [num_rows, vocab_size] float32, rows may be strided. token_ids: [num_rows] int32, contiguous.
    Returns chosen [num_rows] float32, its rank [num_rows] int32 (1: most likely), and top [num_rows, num_top] float32 with
    their ids [num_rows, num_top] int32, descending, equal values by lower id.
    """
    num_rows, vocab_size = logits.shape
    device, is_cuda = logits.device, logits.is_cuda
    if not (
        token_ids.shape == (num_rows,)
        and logits.dtype is torch.float32
        and logits.stride(1) == 1
        and fit(torch.int32, is_cuda, token_ids)
        and 0 <= num_top <= vocab_size
    ):
        expected = "logits [R, V] float32 and token_ids [R] int32 on one device, num_top from 0 to V"
        refuse("logprobs", expected, logits=logits, token_ids=token_ids, num_top=num_top)
    chosen = torch.empty(num_rows, dtype=torch.float32, device=device)
    rank = torch.empty(num_rows, dtype=torch.int32, device=device)
    top = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int32, device=device)
    pointers = addresses(logits, token_ids, chosen, rank, top, top_ids)
    run("logprobs", is_cuda, *pointers, logits.stride(0), num_rows, vocab_size, num_top)
    return chosen, rank, top, top_ids
