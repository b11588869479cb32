"""What every operation does at the border: compare tensors with what is expected, refuse, take addresses, call the kernel."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from pagedcore import _kernels

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kernels/ops.h: DType


def fit(dtype: torch.dtype, is_cuda: bool, *tensors: Tensor | None) -> bool:
    """Whether all tensors given are contiguous, of this dtype and on this kind of device."""
    for tensor in tensors:
        if tensor is not None and not (tensor.dtype is dtype and tensor.is_cuda is is_cuda and tensor.is_contiguous()):
            return False
    return True


def refuse(name: str, expected: str, **given: Tensor | float | None) -> NoReturn:
    """Raise the ValueError that says what an operation expects and what it was given."""
    parts = []
    for key, value in given.items():
        if isinstance(value, Tensor):
            parts.append(f"{key} {value.dtype} {list(value.shape)} strides {value.stride()} on {value.device}")
        else:
            parts.append(f"{key} {value}")
    raise ValueError(f"{name}: expected {expected}; got {', '.join(parts)}")


def addresses(*tensors: Tensor | None) -> list[int]:
    """Where the tensors' elements start; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def run(name: str, is_cuda: bool, *arguments: float) -> None:
    """Call a kernel of this name on the device, a GPU's on the current stream."""
    if is_cuda:
        require_cuda()
        getattr(_kernels.cuda, name)(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        getattr(_kernels.cpu, name)(*arguments)


def require_cuda() -> None:
    if not _kernels.has_cuda:
        raise RuntimeError("pagedcore was built without CUDA kernels: rebuild it where nvcc is found")
