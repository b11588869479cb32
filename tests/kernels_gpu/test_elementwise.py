"""The GPU's normalization, activation, rotation and copy kernels against float64 and torch."""

from __future__ import annotations

import pytest
import torch

from pagedcore import ops

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(out).all()
    error = (out.double() - expected).norm() / expected.norm()
    assert error < tolerance(out.dtype), f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [64, 576, 1024, 4096, 16384])
def test_rms_norm(dtype: torch.dtype, hidden_size: int) -> None:
    for num_tokens in (1, 5, 300):
        x, before = torch.randn(2, num_tokens, hidden_size, device="cuda").to(dtype)
        weight = torch.rand(hidden_size, device="cuda").to(dtype) + 0.5
        for residual in (None, before.clone()):
            out = torch.full_like(x, float("nan"))
            ops.rms_norm(x, weight, 1e-5, residual, out)
            total = x if residual is None else x + before
            if residual is not None:
                assert torch.equal(residual, total)
            exact = total.double()
            assert_close(out, exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [64, 768, 2560, 5120, 16384])
def test_layer_norm(dtype: torch.dtype, hidden_size: int) -> None:
    for num_tokens in (1, 5, 300):
        x, before = torch.randn(2, num_tokens, hidden_size, device="cuda").to(dtype) + 2
        weight, bias = (torch.rand(2, hidden_size, device="cuda") + 0.5).to(dtype)
        for residual in (None, before.clone()):
            out = torch.full_like(x, float("nan"))
            ops.layer_norm(x, weight, bias, 1e-5, residual, out)
            total = x if residual is None else x + before
            if residual is not None:
                assert torch.equal(residual, total)
            exact = total.double()
            exact = exact - exact.mean(-1, keepdim=True)
            exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            assert_close(out, exact * weight.double() + bias.double())
        in_place = before.clone()
        ops.layer_norm(x, weight, bias, 1e-5, in_place, in_place)
        assert torch.equal(in_place, out)


def test_layer_norm_of_small_deviations_from_a_large_mean() -> None:
    x = torch.randn(4, 5120, device="cuda") + 3000
    weight, bias = torch.ones(5120, device="cuda"), torch.zeros(5120, device="cuda")
    exact = x.double() - x.double().mean(-1, keepdim=True)
    exact = exact / exact.square().mean(-1, keepdim=True).sqrt()
    # The mean itself is rounded to about 2^-13; a variance from the squares would be wrong in its first digits.
    assert (ops.layer_norm(x, weight, bias, 1e-5).double() - exact).abs().max() < 2e-3


def test_norms_refuse_rows_they_are_not_made_for() -> None:
    for hidden_size in (60, 16392):
        x, weight = torch.ones(2, hidden_size, device="cuda"), torch.ones(hidden_size, device="cuda")
        with pytest.raises(ValueError, match=f"hidden_size: the CUDA layer_norm needs .* got {hidden_size}"):
            ops.layer_norm(x, weight, weight, 1e-5)
        with pytest.raises(ValueError, match=f"hidden_size: the CUDA rms_norm needs .* got {hidden_size}"):
            ops.rms_norm(x, weight, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu(dtype: torch.dtype) -> None:
    for num_tokens, size in ((1, 3072), (7, 20480), (300, 64)):
        x = torch.randn(num_tokens, size, device="cuda").to(dtype)
        x[0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
        expected = torch.where(x < 0, torch.zeros_like(x), x)
        out = torch.full_like(x, -7.0)
        ops.relu(x, out)
        assert torch.allclose(out, expected, rtol=0, atol=0, equal_nan=True)
        ops.relu(x, x)
        assert torch.allclose(x, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    for num_tokens, size in ((1, 1536), (7, 14336), (300, 64)):
        x = torch.randn(num_tokens, 2 * size, device="cuda").to(dtype) * 3
        out = torch.full((num_tokens, size), float("nan"), dtype=dtype, device="cuda")
        ops.silu_and_mul(x, out)
        gate, up = x.double().chunk(2, -1)
        assert_close(out, torch.nn.functional.silu(gate) * up)


def test_copy_blocks() -> None:
    cache = torch.randn(3, 2, 9, 2, 16, 64, device="cuda").bfloat16()
    expected = cache.clone()
    pairs = torch.tensor([[1, 0], [7, 8], [2, 5]], dtype=torch.int32, device="cuda")
    for source, target in pairs.tolist():
        expected[:, :, target] = cache[:, :, source]
    ops.copy_blocks(cache, pairs)
    torch.cuda.synchronize()
    assert torch.equal(cache, expected)
    host = torch.zeros(3, 2, 4, 2, 16, 64, dtype=torch.bfloat16).pin_memory()
    ops.swap_blocks(cache, host, torch.tensor([[8, 3], [5, 1]], dtype=torch.int32, device="cuda"))
    torch.cuda.synchronize()
    assert torch.equal(host[:, :, 3], expected[:, :, 8].cpu()) and torch.equal(host[:, :, 1], expected[:, :, 5].cpu())
    assert (host[:, :, 0] == 0).all() and (host[:, :, 2] == 0).all()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first 2 * cos.shape[-1] elements of x [tokens, heads, head_dim], pairs half of that apart (float64)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(9, 3, 64, 64), (4, 4, 80, 32), (16, 8, 128, 128), (4, 1, 256, 256), (4, 2, 96, 0)],
)
@pytest.mark.parametrize("with_norm", [False, True])
def test_rotary_write_kv(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, with_norm: bool
) -> None:
    num_tokens, block_size, num_blocks = 37, 16, 9
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, device="cuda").to(dtype)
    before = qkv.view(num_tokens, -1, head_dim).double()
    angles = torch.rand(500, rotary_dim // 2, device="cuda", dtype=torch.float64) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).float() if rotary_dim else None
    positions = torch.randint(0, 500, (num_tokens,), dtype=torch.int32, device="cuda")
    slots = torch.randperm(num_blocks * block_size, device="cuda")[:num_tokens].int()
    slots[5] = -1
    norms = [torch.rand(head_dim, device="cuda").to(dtype) + 0.5 for _ in range(2)] if with_norm else [None, None]
    k_cache, v_cache = torch.zeros(2, num_blocks, kv_heads, block_size, head_dim, dtype=dtype, device="cuda")
    ops.rotary_write_kv(qkv, cos_sin, positions, slots, k_cache, v_cache, heads, kv_heads, head_dim, *norms)
    q, k, v = torch.split(before, [heads, kv_heads, kv_heads], 1)
    expected = []
    for x, norm in ((q, norms[0]), (k, norms[1])):
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
        where = positions.long()
        expected.append(rotated(x, angles.cos()[where], angles.sin()[where]))
    after = qkv.view(num_tokens, -1, head_dim)
    assert_close(after[:, :heads], expected[0])
    assert_close(after[:, heads : heads + kv_heads], expected[1])
    assert torch.equal(after[:, heads + kv_heads :].double(), v)
    written = torch.zeros(num_blocks * block_size, dtype=torch.bool, device="cuda")
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            written[slot] = True
            block, offset = divmod(slot, block_size)
            assert torch.equal(k_cache[block, :, offset], after[token, heads : heads + kv_heads])
            assert torch.equal(v_cache[block, :, offset], after[token, heads + kv_heads :])
    for cache in (k_cache, v_cache):
        assert (cache.transpose(1, 2).reshape(num_blocks * block_size, -1)[~written] == 0).all()
