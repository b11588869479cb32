"""Linear layers: on the CPU with weights laid out once for the processor, on a GPU with the weights as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pagedcore import _kernels
from pagedcore.ops.border import DTYPE_CODES, addresses, fit, refuse, require_cuda, run
from pagedcore.ops.cpu import request_huge_pages

MAX_SKINNY_ROWS = 32
INVARIANT_ROWS = 256  # of every product of `invariant_linear`

_CACHE_LINE = 64
_LINEAR_RULE = "x [T, K], weight [N, K], bias [N] and out [T, N] on a GPU"


class WeightArena:
    """Memory in which packed weights lie side by side, in huge pages where the system has them.

    A decode step reads every weight once. A weight alone is often smaller than a huge page; in small pages, looking their
    addresses up takes a good part of a step.
    """

    _SLAB_BYTES = 64 << 20  # a slab's unused end is never touched and so takes no memory

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """An uninitialized uint8 tensor that starts at a cache line. A slab lives as long as one of its tensors."""
        start = -(-self._used // _CACHE_LINE) * _CACHE_LINE
        if start + num_bytes > len(self._slab):
            self._slab = torch.empty(max(num_bytes, self._SLAB_BYTES) + _CACHE_LINE, dtype=torch.uint8)
            request_huge_pages(self._slab)
            start = -self._slab.data_ptr() % _CACHE_LINE
        self._used = start + num_bytes
        return self._slab[start : self._used]


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out_features, in_features], laid out for this processor."""

    data: Tensor  # uint8; only `packed_linear` can read it
    out_features: int
    in_features: int
    dtype: torch.dtype


def pack_linear(weight: Tensor, arena: WeightArena | None = None) -> PackedWeight:
    """Lay a weight [out_features, in_features] on the CPU out for `packed_linear`, in the arena or in memory of its own."""
    if not (weight.dim() == 2 and weight.dtype in DTYPE_CODES and fit(weight.dtype, False, weight)):
        refuse("pack_linear", "a contiguous weight [out, in], float32, bfloat16 or float16, on the CPU", weight=weight)
    out_features, in_features = weight.shape
    code = DTYPE_CODES[weight.dtype]
    size = _kernels.cpu.packed_linear_bytes(out_features, in_features, code)
    data = torch.empty(size, dtype=torch.uint8) if arena is None else arena.take(size)
    _kernels.cpu.pack_linear(data.data_ptr(), weight.data_ptr(), out_features, in_features, code)
    return PackedWeight(data, out_features, in_features, weight.dtype)


def packed_linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x W^T (+ bias), accumulated in float32, on the CPU.

    x: [num_tokens, in_features] of the weight's dtype, rows may be strided. bias: [out_features] of the same dtype.
    out: [num_tokens, out_features], rows may be strided; of x's dtype or float32 (out_dtype, where out is not given). Returns out.
    """
    num_tokens, in_features = x.shape
    dtype, out_features = x.dtype, packed.out_features
    if out is None:
        out = torch.empty((num_tokens, out_features), dtype=out_dtype or dtype, device=x.device)
    x_stride, x_element_stride = x.stride()
    out_stride, out_element_stride = out.stride()
    if not (
        in_features == packed.in_features
        and out.shape == (num_tokens, out_features)
        and (bias is None or bias.shape == (out_features,))
        and dtype is packed.dtype
        and (out.dtype is dtype or out.dtype is torch.float32)
        and x_element_stride == out_element_stride == 1
        and x.is_cpu
        and out.is_cpu
        and fit(dtype, False, bias)
    ):
        expected = (
            f"x {packed.dtype} [T, {packed.in_features}], out [T, {out_features}] of the same dtype or float32, bias "
            f"{packed.dtype} [{out_features}], on the CPU"
        )
        refuse("packed_linear", expected, x=x, bias=bias, out=out)
    strides = (x_stride, out_stride)
    sizes = (num_tokens, in_features, out_features)
    codes = (DTYPE_CODES[dtype], DTYPE_CODES[out.dtype])
    run("packed_linear", False, *addresses(out, x, packed.data, bias), *strides, *sizes, *codes)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, skinny: bool | None = None) -> Tensor:
    """y = x W^T (+ bias), accumulated in float32, on a GPU: by a kernel of our own where that is faster than cuBLAS.

    x: [num_tokens, in_features], rows may be strided. weight: [out_features, in_features], which is read before the kernels
    ahead have ended: none of ours may write it. bias: [out_features]. out: [num_tokens, out_features], of x's dtype or, without a
    bias, float32. skinny: whether to use our own kernel (up to 32
    rows), whatever is faster. Returns out.
    """
    if not _are_linear(x, weight, bias, out):
        refuse("linear", _LINEAR_RULE, x=x, weight=weight, bias=bias, out=out)
    if skinny is None:
        skinny = _is_skinny(x, len(weight))
    if skinny:
        _skinny_linear(x, weight, bias, out, False)
    else:
        _library_linear(x, weight, bias, out)
    return out


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """As `linear`, but a token's result is the same bits at every place of every batch (ADR 0010).

    cuBLAS chooses its algorithm by the number of rows, so it gets INVARIANT_ROWS of them every time. x and out lie in memory that
    has room behind their end for as many rows as make a multiple of that: what is there is read, and overwritten, and may be
    anything. Returns out.
    """
    if not (_are_linear(x, weight, bias, out) and _has_room(x) and _has_room(out)):
        expected = f"{_LINEAR_RULE}, with room for a multiple of {INVARIANT_ROWS} rows"
        refuse("invariant_linear", expected, x=x, weight=weight, bias=bias, out=out)
    for first in range(0, len(x), INVARIANT_ROWS):
        _library_linear(_rows_from(x, first), weight, bias, _rows_from(out, first))
    return out


def invariant_rows(num_rows: int) -> int:
    """How many rows there must be room for where `invariant_linear` works on up to `num_rows`."""
    return -(-num_rows // INVARIANT_ROWS) * INVARIANT_ROWS


def gated_linear(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """y = silu(x W1^T) * (x W2^T) in one kernel on a GPU, W1 and W2 the halves of W; False, and nothing done, where it has none.

    x: [num_tokens, in_features], rows may be strided. weight: [2 * size, in_features], read early as in `linear`.
    out: [num_tokens, size]. All of one dtype. The results are those of `linear` by our own kernel and `silu_and_mul`, each
    operation rounded (SwiGLU, Shazeer 2020, equation 6).
    """
    (num_tokens, in_features), dtype = x.shape, x.dtype
    if not (
        weight.shape == (2 * out.shape[1], in_features)
        and len(out) == num_tokens
        and x.stride(1) == 1
        and x.is_cuda
        and fit(dtype, True, weight, out)
    ):
        refuse("gated_linear", "x [T, K], weight [2 * N, K] and out [T, N] on a GPU", x=x, weight=weight, out=out)
    if len(weight) % 32 or not _is_skinny(x, len(weight)):
        return False
    _skinny_linear(x, weight, None, out, True)
    return True


def _are_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> bool:
    """Whether these are what _LINEAR_RULE says."""
    (num_tokens, in_features), out_features, dtype = x.shape, len(weight), x.dtype
    return (
        weight.shape == (out_features, in_features)
        and out.shape == (num_tokens, out_features)
        and (bias is None or bias.shape == (out_features,))
        and (out.dtype is dtype or (out.dtype is torch.float32 and bias is None))
        and x.stride(1) == 1
        and x.is_cuda
        and fit(dtype, True, weight, bias)
        and fit(out.dtype, True, out)
    )


def _library_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """By cuBLAS."""
    if bias is not None:
        torch.addmm(bias, x, weight.t(), out=out)
    elif out.dtype is x.dtype:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)


def _has_room(rows: Tensor) -> bool:
    """Whether the memory goes on behind these rows for as many as make a multiple of INVARIANT_ROWS."""
    last = rows.storage_offset() + (invariant_rows(len(rows)) - 1) * rows.stride(0)
    return (last + rows.shape[1]) * rows.itemsize <= rows.untyped_storage().nbytes()


def _rows_from(rows: Tensor, first: int) -> Tensor:
    """INVARIANT_ROWS rows of the memory in which these lie, from number `first` on."""
    offset = rows.storage_offset() + first * rows.stride(0)
    return rows.as_strided((INVARIANT_ROWS, rows.shape[1]), rows.stride(), offset)


def _skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, is_gated: bool) -> None:
    sizes = (x.stride(0), len(x), x.shape[1], len(weight))
    codes = (DTYPE_CODES[x.dtype], DTYPE_CODES[out.dtype], is_gated)
    run("skinny_linear", True, *addresses(out, x, weight, bias), *sizes, *codes)


def _is_skinny(x: Tensor, out_features: int) -> bool:
    """Whether `skinny_linear` takes these sizes. It is the faster one or as fast at all that were measured (ADR 0007)."""
    return (
        len(x) <= MAX_SKINNY_ROWS
        and x.dtype is not torch.float32
        and x.stride(0) % 8 == 0
        and x.shape[1] % 64 == 0
        and out_features % 16 == 0
        and x.data_ptr() % 16 == 0
        and _has_skinny_linear()
    )


@cache
def _has_skinny_linear() -> bool:
    require_cuda()
    return _kernels.cuda.has_skinny_linear()
