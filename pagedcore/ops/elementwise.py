"""Operations between the linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedcore.ops.border import DTYPE_CODES, addresses, fit, refuse, run


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, equation 4).

    x, residual, out: [num_tokens, hidden_size], contiguous. weight: [hidden_size]. With a residual, it becomes
    residual + x and that is normalized. Returns out.
    """
    if out is None:
        out = torch.empty_like(x)
    shape, dtype, is_cuda = x.shape, x.dtype, x.is_cuda
    if not (
        len(shape) == 2
        and out.shape == shape
        and weight.shape == shape[1:]
        and (residual is None or residual.shape == shape)
        and dtype in DTYPE_CODES
        and fit(dtype, is_cuda, x, weight, residual, out)
    ):
        expected = "x, residual and out [T, H] and weight [H], contiguous, of one dtype, on one device"
        refuse("rms_norm", expected, x=x, weight=weight, residual=residual, out=out)
    run("rms_norm", is_cuda, *addresses(out, x, residual, weight), *shape, eps, DTYPE_CODES[dtype])
    return out


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, variance being the biased one (Ba et al. 2016, equation 4).

    x, residual, out: [num_tokens, hidden_size], contiguous; out may be the residual. weight, bias: [hidden_size]. With a
    residual, it becomes residual + x and that is normalized. Returns out.
    """
    if out is None:
        out = torch.empty_like(x)
    shape, dtype, is_cuda = x.shape, x.dtype, x.is_cuda
    if not (
        len(shape) == 2
        and out.shape == shape
        and weight.shape == bias.shape == shape[1:]
        and (residual is None or residual.shape == shape)
        and dtype in DTYPE_CODES
        and fit(dtype, is_cuda, x, weight, bias, residual, out)
    ):
        expected = "x, residual and out [T, H], weight and bias [H], contiguous, of one dtype, on one device"
        refuse("layer_norm", expected, x=x, weight=weight, bias=bias, residual=residual, out=out)
    run("layer_norm", is_cuda, *addresses(out, x, residual, weight, bias), *shape, eps, DTYPE_CODES[dtype])
    return out


def silu_and_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up for rows [gate | up] (SwiGLU, Shazeer 2020, equation 6).

    x: [num_tokens, 2 * size], contiguous. Returns out: [num_tokens, size].
    """
    num_tokens, width = x.shape
    size = width // 2
    dtype, is_cuda = x.dtype, x.is_cuda
    if out is None:
        out = torch.empty((num_tokens, size), dtype=dtype, device=x.device)
    if not (
        width == 2 * size and out.shape == (num_tokens, size) and dtype in DTYPE_CODES and fit(dtype, is_cuda, x, out)
    ):
        refuse("silu_and_mul", "x [T, 2 N] and out [T, N], contiguous, of one dtype, on one device", x=x, out=out)
    run("silu_and_mul", is_cuda, *addresses(out, x), num_tokens, size, DTYPE_CODES[dtype])
    return out


def relu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """max(x, 0).

    x: [num_tokens, size], contiguous. Returns out: [num_tokens, size]; it may be x.
    """
    if out is None:
        out = torch.empty_like(x)
    shape, dtype, is_cuda = x.shape, x.dtype, x.is_cuda
    if not (len(shape) == 2 and out.shape == shape and dtype in DTYPE_CODES and fit(dtype, is_cuda, x, out)):
        refuse("relu", "x and out [T, N], contiguous, of one dtype, on one device", x=x, out=out)
    run("relu", is_cuda, *addresses(out, x), *shape, DTYPE_CODES[dtype])
    return out
