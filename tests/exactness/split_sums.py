"""The inverse control: a linear layer whose bits depend on the number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from pagedcore import ops
from pagedcore.ops import PackedWeight

MAX_SPLIT_ROWS = 4


@contextmanager
def planted() -> Iterator[None]:
    """In engines that run without graphs, sums for a few rows are made of two halves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "packed_linear", _split(ops.packed_linear))
        yield


def _split(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`packed_linear`, but as kernels do that keep all threads busy with few rows: each sum is cut in two."""

    def linear(
        x: torch.Tensor,
        packed: PackedWeight,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        if len(x) > MAX_SPLIT_ROWS:
            return original(x, packed, bias, out_dtype, out)
        halves = x.repeat(2, 1)
        middle = x.shape[1] // 2
        halves[: len(x), middle:] = 0
        halves[len(x) :, :middle] = 0
        first, second = original(halves, packed, None, torch.float32).chunk(2)
        return out.copy_(first + second + (0 if bias is None else bias.float()))

    return linear
