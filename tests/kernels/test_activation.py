"""silu_and_mul against float64 and relu against its definition on every instruction set."""

from __future__ import annotations

import pytest
import torch

from pagedcore import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1, 3, 8, 15, 16, 17, 64, 1003, 1536))
def test_matches_float64(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    for rows in (1, 2, 23):
        x = (6 * torch.randn(rows, 2 * size, generator=generator)).to(dtype)
        out = torch.full((rows + 1, size), -7.0, dtype=dtype)
        ops.silu_and_mul(x, out[:rows])
        expected = reference(x)
        bound = (torch.finfo(dtype).eps / 2 + 1e-6) * expected.abs() + torch.finfo(dtype).smallest_normal
        assert ((out[:rows].double() - expected).abs() <= bound).all()
        assert (out[rows] == -7.0).all()


@pytest.mark.usefixtures("instruction_set")
def test_the_whole_range_of_the_gate() -> None:
    gate = torch.cat((torch.linspace(-100, 100, 4001), torch.tensor([-3e38, 3e38, -1e-30, 0.0])))
    x = torch.cat((gate, torch.ones_like(gate))).view(1, -1)
    expected = reference(x)
    # Below -87, where silu itself is that small, only its smallness counts.
    assert ((ops.silu_and_mul(x).double() - expected).abs() <= 1e-6 * expected.abs() + 2e-36).all()


@pytest.mark.usefixtures("instruction_set")
def test_nan_and_infinity_stay_visible() -> None:
    nan, inf = float("nan"), float("inf")
    gate = torch.tensor([nan, inf, 1.0, 1.0, 2.0])
    up = torch.tensor([1.0, 1.0, nan, inf, 3.0])
    out = ops.silu_and_mul(torch.cat((gate, up)).view(1, -1))[0]
    assert out[0].isnan()
    assert out[1] == inf
    assert out[2].isnan()
    assert out[3] == inf
    assert out[4].isfinite()


@pytest.mark.usefixtures("instruction_set", "restore_threads")
def test_a_row_depends_neither_on_others_nor_on_threads() -> None:
    x = torch.randn(100, 2 * 1536, generator=torch.Generator().manual_seed(0)).bfloat16()
    ops.set_num_threads(1)
    whole = ops.silu_and_mul(x)
    ops.set_num_threads(4)
    assert torch.equal(ops.silu_and_mul(x), whole)
    for row in range(0, 100, 13):
        assert torch.equal(ops.silu_and_mul(x[row : row + 1].clone())[0], whole[row])


@pytest.mark.usefixtures("instruction_set", "restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1, 3, 16, 17, 1003))
def test_relu_is_exact_and_may_be_in_place(size: int, dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    generator = torch.Generator().manual_seed(size)
    for rows in (1, 2, 23):
        x = torch.randn(rows, size, generator=generator).to(dtype)
        x.view(-1)[:5] = torch.tensor([nan, inf, -inf, -0.0, 0.0], dtype=dtype)[: x.numel()]
        expected = torch.where(x < 0, torch.zeros_like(x), x)
        for num_threads in (1, 4):
            ops.set_num_threads(num_threads)
            out = torch.full((rows + 1, size), -7.0, dtype=dtype)
            ops.relu(x, out[:rows])
            assert torch.allclose(out[:rows], expected, rtol=0, atol=0, equal_nan=True)
            assert (out[rows] == -7.0).all()
        assert ops.relu(x, x) is x
        assert torch.allclose(x, expected, rtol=0, atol=0, equal_nan=True)


def test_wrong_arguments_of_relu_are_named() -> None:
    with pytest.raises(ValueError, match=r"relu: expected .*; got .*out torch.float32 \[2, 7\]"):
        ops.relu(torch.ones(2, 8), torch.ones(2, 7))
