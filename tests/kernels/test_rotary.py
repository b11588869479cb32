"""Rotary embedding, head normalization and the KV cache write on every instruction set, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pagedcore import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
MAX_POSITION = 500


@dataclass(frozen=True)
class Case:
    """The arguments of `ops.rotary_write_kv`."""

    qkv: Tensor
    cos_sin: Tensor | None
    positions: Tensor
    slot_mapping: Tensor
    k_cache: Tensor
    v_cache: Tensor
    num_heads: int
    num_kv_heads: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[3]

    def run(self) -> None:
        ops.rotary_write_kv(
            self.qkv,
            self.cos_sin,
            self.positions,
            self.slot_mapping,
            self.k_cache,
            self.v_cache,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.q_norm,
            self.k_norm,
            EPS,
        )


def random_case(
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    num_tokens: int = 41,
    block_size: int = 16,
    num_heads: int = 6,
    num_kv_heads: int = 2,
) -> Case:
    """Rows of qkv lie in a wider tensor; the slots are shuffled; every seventh token is padding."""
    generator = torch.Generator().manual_seed(head_dim)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn(num_tokens, width + 16, generator=generator).to(dtype)[:, :width]
    angles = torch.rand(MAX_POSITION, rotary_dim // 2, generator=generator) * 6.28
    num_blocks = -(-num_tokens // block_size) + 2
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens].int()
    slots[::7] = -1
    positions = torch.randint(MAX_POSITION, (num_tokens,), generator=generator).int()
    k_cache = torch.full((num_blocks, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    return Case(qkv, cos_sin, positions, slots, k_cache, k_cache.clone(), num_heads, num_kv_heads)


def rotated(heads: Tensor, case: Case, norm: Tensor | None) -> Tensor:
    """Normalize, then turn the pairs (i, i + rotary_dim / 2) as complex numbers; [num_tokens, heads, head_dim] float64."""
    x = heads.double()
    if norm is not None:
        x = x / (x.pow(2).mean(dim=-1, keepdim=True) + EPS).sqrt() * norm.double()
    if case.cos_sin is None:
        return x
    half = case.cos_sin.shape[1] // 2
    cos_sin = case.cos_sin[case.positions.long()].double()
    turn = torch.complex(cos_sin[:, :half], cos_sin[:, half:])[:, None]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def check(case: Case) -> None:
    num_tokens = len(case.positions)
    before = case.qkv.view(num_tokens, -1, case.head_dim).clone()
    first_k, first_v = case.num_heads, case.num_heads + case.num_kv_heads
    q = rotated(before[:, :first_k], case, case.q_norm)
    k = rotated(before[:, first_k:first_v], case, case.k_norm)
    case.run()
    real = case.slot_mapping >= 0
    heads = case.qkv.view(num_tokens, -1, case.head_dim)
    rounding = torch.finfo(case.qkv.dtype).eps / 2
    for actual, expected in ((heads[:, :first_k], q), (heads[:, first_k:first_v], k)):
        error = (actual.double() - expected).abs()[real]
        assert (error <= rounding * expected[real].abs() + 2e-6).all()
    assert torch.equal(heads[:, first_v:], before[:, first_v:])
    assert torch.equal(heads[~real], before[~real])

    slots = case.slot_mapping[real].long()
    for cache, written in ((case.k_cache, heads[real, first_k:first_v]), (case.v_cache, heads[real, first_v:])):
        by_slot = cache.transpose(1, 2).flatten(0, 1)  # [num_slots, num_kv_heads, head_dim]
        assert torch.equal(by_slot[slots], written)
        untouched = torch.ones(len(by_slot), dtype=torch.bool)
        untouched[slots] = False
        assert by_slot[untouched].isnan().all()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (16, 32, 64, 80, 96, 128, 256))
def test_dtypes_and_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(random_case(dtype, head_dim))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("rotary_dim", (2, 20, 32, 62))
def test_partial_rotation_leaves_the_other_dimensions(rotary_dim: int) -> None:
    check(random_case(torch.bfloat16, 64, rotary_dim))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", (0, 24, 96))
def test_head_normalization(rotary_dim: int, dtype: torch.dtype) -> None:
    case = random_case(dtype, 96, rotary_dim)
    q_norm, k_norm = torch.rand(2, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(replace(case, q_norm=q_norm, k_norm=k_norm, cos_sin=case.cos_sin if rotary_dim else None))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("block_size", (1, 4, 64, 256))
def test_block_sizes_and_head_counts(block_size: int) -> None:
    for num_tokens, num_heads, num_kv_heads in ((1, 1, 1), (17, 8, 8), (200, 14, 2)):
        case = random_case(num_tokens=num_tokens, block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_tokens == 1:
            case.slot_mapping.fill_(block_size + block_size // 2)
        check(case)


@pytest.mark.usefixtures("instruction_set")
def test_without_rotation_only_the_cache_is_written() -> None:
    case = replace(random_case(torch.bfloat16), cos_sin=None)
    before = case.qkv.clone()
    check(case)
    assert torch.equal(case.qkv, before)


@pytest.mark.usefixtures("instruction_set", "restore_threads")
def test_threads_change_nothing() -> None:
    results = []
    for num_threads in (1, 2, 3):
        ops.set_num_threads(num_threads)
        case = random_case(torch.bfloat16, num_tokens=300)
        case.run()
        results.append((case.qkv, case.k_cache.nan_to_num()))
    for qkv, k_cache in results[1:]:
        assert torch.equal(qkv, results[0][0])
        assert torch.equal(k_cache, results[0][1])


def test_wrong_arguments_are_named() -> None:
    case = random_case()
    assert case.cos_sin is not None
    for wrong, field in (
        (replace(case, num_heads=7), r"qkv torch.float32 \[41, 640\]"),
        (replace(case, v_cache=case.v_cache.half()), "v_cache torch.float16"),
        (replace(case, slot_mapping=case.slot_mapping.long()), "slot_mapping torch.int64"),
        (replace(case, positions=case.positions[1:]), r"positions torch.int32 \[40\]"),
        (replace(case, cos_sin=case.cos_sin.bfloat16()), "cos_sin torch.bfloat16"),
        (replace(case, cos_sin=torch.zeros(9, 80)), r"cos_sin torch.float32 \[9, 80\]"),
        (replace(case, q_norm=torch.ones(63)), r"norm torch.float32 \[63\]"),
    ):
        with pytest.raises(ValueError, match=f"rotary_write_kv: expected .*; got .*{field}"):
            wrong.run()
