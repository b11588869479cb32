"""rms_norm against float64 on every instruction set."""

from __future__ import annotations

import pytest
import torch

from pagedcore import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 3, 8, 15, 16, 17, 64, 576, 1003)
EPS = 1e-5


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()


def tolerance(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (torch.finfo(dtype).eps / 2 + 2e-6) * expected.abs() + 1e-7


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_matches_float64(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    for rows in (1, 2, 37):
        x = (3 * torch.randn(rows, size, generator=generator)).to(dtype)
        weight = torch.randn(size, generator=generator).to(dtype)
        out = torch.full((rows + 1, size), -7.0, dtype=dtype)
        ops.rms_norm(x, weight, EPS, out=out[:rows])
        expected = reference(x, weight)
        assert ((out[:rows].double() - expected).abs() <= tolerance(expected, dtype)).all()
        assert (out[rows] == -7.0).all()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_adds_to_the_residual_and_normalizes_the_sum(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    x, residual = (torch.randn(5, size, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(size, generator=generator).to(dtype)
    total = x + residual
    unchanged = x.clone()
    out = ops.rms_norm(x, weight, EPS, residual)
    assert torch.equal(residual, total)
    assert torch.equal(x, unchanged)
    expected = reference(total, weight)
    assert ((out.double() - expected).abs() <= tolerance(expected, dtype)).all()


@pytest.mark.usefixtures("instruction_set", "restore_threads")
def test_a_row_depends_neither_on_others_nor_on_threads() -> None:
    x = torch.randn(200, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.rand(576, generator=torch.Generator().manual_seed(1)).bfloat16()
    ops.set_num_threads(1)
    whole = ops.rms_norm(x, weight, EPS)
    ops.set_num_threads(4)
    assert torch.equal(ops.rms_norm(x, weight, EPS), whole)
    for row in range(0, 200, 17):
        assert torch.equal(ops.rms_norm(x[row : row + 1].clone(), weight, EPS)[0], whole[row])
    x[3] = float("nan")
    mixed = ops.rms_norm(x, weight, EPS)
    assert mixed[3].isnan().all()
    assert torch.equal(mixed[4:], whole[4:])
