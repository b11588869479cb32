"""rms_norm and layer_norm against float64 on every instruction set."""

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


def layer_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    centered = wide - wide.mean(dim=-1, keepdim=True)
    return centered / (centered.pow(2).mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double() + bias.double()


def layer_case(size: int, dtype: torch.dtype, rows: int, mean: float = 1.0) -> list[torch.Tensor]:
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(size)
    x = 3 * torch.randn(rows, size, generator=generator) + mean
    return [x.to(dtype), *(torch.randn(size, generator=generator).to(dtype) for _ in range(2))]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_layer_norm_matches_float64(size: int, dtype: torch.dtype) -> None:
    for rows in (1, 2, 37):
        x, weight, bias = layer_case(size, dtype, rows)
        out = torch.full((rows + 1, size), -7.0, dtype=dtype)
        ops.layer_norm(x, weight, bias, EPS, out=out[:rows])
        expected = layer_reference(x, weight, bias)
        bound = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5
        assert ((out[:rows].double() - expected).abs() <= bound).all()
        assert (out[rows] == -7.0).all()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("size", (17, 576))
def test_layer_norm_of_small_deviations_from_a_large_mean(size: int) -> None:
    x, weight, bias = layer_case(size, torch.float32, 4, mean=3000.0)
    expected = layer_reference(x, weight, bias)
    # The mean itself is rounded to about 2^-13 here; a variance from the squares would be wrong in its first digits.
    assert ((ops.layer_norm(x, weight, bias, EPS).double() - expected).abs() <= 1e-3).all()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1, 17, 576))
def test_layer_norm_adds_to_the_residual_which_may_be_the_output(size: int, dtype: torch.dtype) -> None:
    x, weight, bias = layer_case(size, dtype, 5)
    before = torch.randn(5, size, generator=torch.Generator().manual_seed(9)).to(dtype)
    total, unchanged, residual, in_place = x + before, x.clone(), before.clone(), before.clone()
    out = ops.layer_norm(x, weight, bias, EPS, residual)
    assert torch.equal(residual, total)
    assert torch.equal(out, ops.layer_norm(total, weight, bias, EPS))
    assert ops.layer_norm(x, weight, bias, EPS, in_place, in_place) is in_place
    assert torch.equal(in_place, out)
    assert torch.equal(x, unchanged)


@pytest.mark.usefixtures("instruction_set", "restore_threads")
def test_a_row_of_layer_norm_depends_neither_on_others_nor_on_threads() -> None:
    x, weight, bias = layer_case(576, torch.bfloat16, 200)
    ops.set_num_threads(1)
    whole = ops.layer_norm(x, weight, bias, EPS)
    ops.set_num_threads(4)
    assert torch.equal(ops.layer_norm(x, weight, bias, EPS), whole)
    for row in range(0, 200, 17):
        assert torch.equal(ops.layer_norm(x[row : row + 1].clone(), weight, bias, EPS)[0], whole[row])
    x[3] = float("nan")
    mixed = ops.layer_norm(x, weight, bias, EPS)
    assert mixed[3].isnan().all()
    assert torch.equal(mixed[4:], whole[4:])


def test_wrong_arguments_of_layer_norm_are_named() -> None:
    x, weight, bias = layer_case(16, torch.float32, 3)
    with pytest.raises(ValueError, match=r"layer_norm: expected .*; got .*bias torch.float32 \[15\]"):
        ops.layer_norm(x, weight, bias[:15], EPS)
    with pytest.raises(ValueError, match=r"layer_norm: expected .*; got .*residual torch.bfloat16"):
        ops.layer_norm(x, weight, bias, EPS, x.bfloat16())
