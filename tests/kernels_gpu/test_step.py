"""What surrounds attention in a decode step on a GPU: the linear layers of small batches and the step's packed buffer."""

from __future__ import annotations

import pytest
import torch

from pagedcore import _kernels, ops
from pagedcore.engine.step_plan import HEADER_SIZE, NUM_SAMPLING_COLUMNS, Header, StepLayout

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "skinny"),
    [(1, True), (3, True), (8, True), (9, True), (16, True), (17, True), (32, True), (33, None)],
)
@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(16, 64), (48, 576), (6144, 4096), (4096, 14336), (1024, 3072), (2144, 320), (2160, 64), (50272, 128)],
)
def test_linear_is_as_exact_as_its_dtype(
    out_features: int, in_features: int, num_tokens: int, skinny: bool | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(out_features + num_tokens)
    wide = torch.randn(num_tokens, in_features + 8, device=DEVICE, dtype=dtype)
    weight = torch.randn(out_features, in_features, device=DEVICE, dtype=dtype) / in_features**0.5
    bias = torch.randn(out_features, device=DEVICE, dtype=dtype)
    x = wide[:, :in_features]
    exact = x.double() @ weight.double().t()
    rounding = torch.finfo(dtype).eps
    if skinny and not _kernels.cuda.has_skinny_linear():
        with pytest.raises(ValueError, match=r"skinny_linear: .* must be 227 KB, with code built for 9\.0 or higher"):
            ops.linear(x, weight, None, torch.empty(num_tokens, out_features, device=DEVICE, dtype=dtype), skinny=True)
        skinny = None
    for out_dtype, with_bias in ((dtype, False), (dtype, True), (torch.float32, False)):
        out = torch.full((num_tokens, out_features), torch.nan, device=DEVICE, dtype=out_dtype)
        again = torch.full_like(out, torch.nan)
        for target in (out, again):
            ops.linear(x, weight, bias if with_bias else None, target, skinny=skinny)
        expected = exact + bias.double() if with_bias else exact
        tolerance = 2e-5 * in_features**0.5 if out_dtype is torch.float32 else rounding * (1 + expected.abs())
        assert ((out.double() - expected).abs() <= tolerance).all()
        assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 8, 13, 32])
@pytest.mark.parametrize(("size", "in_features"), [(16, 64), (48, 576), (3072, 1024), (14336, 4096)])
def test_gates_are_applied_as_in_two_steps(size: int, in_features: int, num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size + num_tokens)
    x = torch.randn(num_tokens, in_features, device=DEVICE, dtype=dtype)
    weight = torch.randn(2 * size, in_features, device=DEVICE, dtype=dtype) / in_features**0.5
    out = torch.full((num_tokens, size), torch.nan, device=DEVICE, dtype=dtype)
    if not _kernels.cuda.has_skinny_linear():
        assert not ops.gated_linear(x, weight, out)
        return
    assert ops.gated_linear(x, weight, out)
    gate_up = torch.empty(num_tokens, 2 * size, device=DEVICE, dtype=dtype)
    separate = torch.empty_like(out)
    ops.silu_and_mul(ops.linear(x, weight, None, gate_up, skinny=True), separate)
    assert torch.equal(out, separate)
    exact = x.double() @ weight.double().t()
    expected = torch.nn.functional.silu(exact[:, :size]) * exact[:, size:]
    assert ((out.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * (1 + expected.abs())).all()
    assert not ops.gated_linear(x.repeat(33, 1)[:33], weight, out.repeat(33, 1)[:33]), "too many rows for one kernel"


@pytest.mark.parametrize("num_tokens", [1, 8, 32])
def test_layers_in_sequence_see_each_other_results(num_tokens: int) -> None:
    """Kernels start before those ahead have ended; a chain of dependent ones must come out as one by one."""
    torch.manual_seed(num_tokens)
    size, rounds = 1024, 40
    weights = [torch.randn(2 * size, size, device=DEVICE, dtype=torch.bfloat16) / 32 for _ in range(rounds)]
    norm = torch.ones(size, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(num_tokens, size, device=DEVICE, dtype=torch.bfloat16)
    buffers = [torch.empty_like(x) for _ in range(3)]
    gate_up = torch.empty(num_tokens, 2 * size, device=DEVICE, dtype=torch.bfloat16)

    def chain(synchronize: bool) -> torch.Tensor:
        residual, normed, hidden = buffers
        hidden.copy_(x)
        residual.zero_()
        for weight in weights:
            ops.rms_norm(hidden, norm, 1e-6, residual, normed)
            if synchronize:
                torch.cuda.synchronize()
            if not ops.gated_linear(normed, weight, hidden):
                ops.silu_and_mul(ops.linear(normed, weight, None, gate_up), hidden)
            if synchronize:
                torch.cuda.synchronize()
        return residual.clone()

    one_by_one = chain(True)
    assert one_by_one.isfinite().all()
    for _ in range(20):
        assert torch.equal(chain(False), one_by_one)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(False)
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured, one_by_one)


@pytest.mark.parametrize(("num_tokens", "num_rows", "width"), [(1, 1, 1), (5, 5, 300), (300, 7, 2), (64, 64, 130)])
def test_a_packed_buffer_is_spread_to_its_places(num_tokens: int, num_rows: int, width: int) -> None:
    layout = StepLayout(num_tokens, num_rows, width)
    generator = torch.Generator().manual_seed(num_tokens)
    packed = torch.randint(0, 1 << 20, (layout.copies + 9,), generator=generator, dtype=torch.int32)
    packed[: len(Header._fields)] = torch.tensor([num_tokens, num_rows, width] + [0] * (len(Header._fields) - 3))
    ids = packed[HEADER_SIZE : layout.positions]
    ids[::2] = -1 - torch.arange(len(ids[::2]), dtype=torch.int32) % 64
    last = torch.arange(1000, 1064, dtype=torch.int32)
    last[0] = -1  # a row whose logits were not finite
    token_ids = torch.full((512,), -7, dtype=torch.int32, device=DEVICE)
    tables = torch.full((64, 400), -7, dtype=torch.int32, device=DEVICE)
    sampling = torch.full((64, NUM_SAMPLING_COLUMNS), -7, dtype=torch.int32, device=DEVICE)
    ops.unpack_step(packed.cuda(), last.cuda(), token_ids, tables, sampling, num_tokens, num_rows)

    resolved = [int(i) if i >= 0 else max(int(last[-1 - int(i)]), 0) for i in ids]
    assert token_ids.tolist() == resolved + [-7] * (512 - num_tokens)
    assert torch.equal(
        tables[:num_rows, :width].cpu(), packed[layout.block_tables : layout.sampling].view(num_rows, width)
    )
    assert (tables[num_rows:] == -7).all() and (tables[:, width:] == -7).all()
    assert torch.equal(sampling[:num_rows].cpu().flatten(), packed[layout.sampling : layout.copies])
    assert (sampling[num_rows:] == -7).all()
