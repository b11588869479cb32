"""packed_linear against float64, and its promise that a row's bits depend on nothing but the row."""

from __future__ import annotations

import itertools

import pytest
import torch

from pagedcore import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the panel width (32), the vector widths (4 to 16) and the pairs of bfloat16; one shape of the default model.
SHAPES = ((1, 1), (7, 5), (31, 33), (32, 64), (33, 63), (100, 127), (160, 576))
ROWS = (1, 2, 3, 5, 6, 7, 8, 13, 34, 70)


def surrounded(values: torch.Tensor, fill: float) -> torch.Tensor:
    """The same values as rows of a larger tensor full of `fill`, so that whatever is touched beside them shows."""
    rows, columns = values.shape
    outer = torch.full((rows + 2, columns + 5), fill, dtype=values.dtype)
    inner = outer[1:-1, 2:-3]
    inner.copy_(values)
    return inner


def make_case(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + out_features * 31 + in_features)
    x = surrounded(torch.randn(rows, in_features, generator=generator).to(dtype), float("nan"))
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    return x, weight, torch.randn(out_features, generator=generator).to(dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    out_features, in_features = shape
    for rows, with_bias, out_dtype in itertools.product(ROWS, (False, True), (dtype, torch.float32)):
        x, weight, bias = make_case(rows, out_features, in_features, dtype)
        out = surrounded(torch.zeros(rows, out_features, dtype=out_dtype), -123.0)
        ops.packed_linear(x, ops.pack_linear(weight), bias if with_bias else None, out=out)
        expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0.0)
        # The error of a sum in float32, term by term, and half a unit of the result's own type.
        magnitude = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        bound = (in_features + 2) * 2.0**-24 * magnitude + torch.finfo(out_dtype).eps / 2 * expected.abs()
        assert ((out.double() - expected).abs() <= bound * 1.01).all(), (rows, with_bias, out_dtype)
        outer = out._base
        assert outer is not None
        assert (outer == -123.0).sum() == outer.numel() - out.numel()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    x, weight, bias = make_case(70, 100, 131, dtype)
    packed = ops.pack_linear(weight)
    whole = ops.packed_linear(x, packed, bias)
    for rows in (1, 2, 3, 7, 8, 11, 24, 69):
        for begin in range(0, 71 - rows, rows):
            part = ops.packed_linear(x[begin : begin + rows], packed, bias)
            assert torch.equal(part, whole[begin : begin + rows]), (rows, begin)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_stays_alone(dtype: torch.dtype) -> None:
    x, weight, _ = make_case(20, 64, 96, dtype)
    packed = ops.pack_linear(weight)
    good = ops.packed_linear(x, packed)
    x[13] = float("nan")
    bad = ops.packed_linear(x, packed)
    assert bad[13].isnan().all()
    others = torch.arange(20) != 13
    assert torch.equal(bad[others], good[others])


@pytest.mark.usefixtures("instruction_set", "restore_threads")
@pytest.mark.parametrize("rows", (1, 9, 300))
def test_the_number_of_threads_changes_nothing(rows: int) -> None:
    x, weight, bias = make_case(rows, 1000, 600, torch.bfloat16)
    results = []
    for threads in (1, 2, 5):
        ops.set_num_threads(threads)
        results.append(ops.packed_linear(x, ops.pack_linear(weight), bias))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("instruction_set")
def test_blocks_of_rows_and_panels_beyond_the_prefetched_size() -> None:
    # A long sum makes the row blocks short and the panel larger than what is fetched ahead.
    x, weight, _ = make_case(64, 40, 9000, torch.bfloat16)
    out = ops.packed_linear(x, ops.pack_linear(weight), out_dtype=torch.float32)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=9000 * 2.0**-24 * 9000 * 0.7)


def test_no_rows() -> None:
    packed = ops.pack_linear(torch.ones(8, 4))
    assert ops.packed_linear(torch.empty(0, 4), packed).shape == (0, 8)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounds_to_the_nearest_even(dtype: torch.dtype) -> None:
    """Sums that lie halfway between two numbers of the output type, its largest ones, infinities and NaN."""
    unit = torch.finfo(dtype).eps
    sums = torch.tensor(
        [1, 1 + unit / 2, 1 + unit, 1 + 1.5 * unit, -1 - unit / 2, 0.0, 1e30, -1e30], dtype=torch.float64
    )
    # Two exact products make each sum: 1 * high + 1 * low.
    high = sums.to(dtype)
    low = (sums - high.double()).to(dtype).nan_to_num(0.0)
    weight = torch.stack((high, low), dim=1)
    out = ops.packed_linear(torch.ones(1, 2, dtype=dtype), ops.pack_linear(weight))
    assert torch.equal(out[0], (high.double() + low.double()).to(dtype))
    largest = torch.full((1, 2), torch.finfo(dtype).max, dtype=dtype)
    out = ops.packed_linear(torch.tensor([[1, 1], [-1, -1], [1, 0]], dtype=dtype), ops.pack_linear(largest))[:, 0]
    assert out.tolist() == [float("inf"), float("-inf"), torch.finfo(dtype).max]
    special = torch.tensor([[float("inf")], [float("-inf")], [float("nan")]], dtype=dtype)
    out = ops.packed_linear(torch.ones(1, 1, dtype=dtype), ops.pack_linear(special))[0]
    assert out[0] == float("inf")
    assert out[1] == float("-inf")
    assert out[2].isnan()
