"""Copying blocks inside a KV cache and between two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagedcore import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cache(num_blocks: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, num_blocks, 2, 4, 16, generator=generator).to(dtype)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_in_all_layers_and_nothing_else(dtype: torch.dtype) -> None:
    pairs = torch.tensor([[0, 9], [4, 1], [0, 5]], dtype=torch.int32)
    for num_threads in (1, 2):
        ops.set_num_threads(num_threads)
        tensor = cache(10, dtype, 0)
        expected = tensor.clone()
        expected[:, :, [9, 1, 5]] = tensor[:, :, [0, 4, 0]]
        ops.copy_blocks(tensor, pairs)
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swaps_between_caches_of_different_sizes(dtype: torch.dtype) -> None:
    device, host = cache(10, dtype, 0), cache(4, dtype, 1)
    original, expected = device.clone(), host.clone()
    expected[:, :, [3, 0]] = device[:, :, [8, 2]]
    ops.swap_blocks(device, host, torch.tensor([[8, 3], [2, 0]], dtype=torch.int32))
    assert torch.equal(host, expected)
    assert torch.equal(device, original)
    ops.swap_blocks(host, device, torch.tensor([[3, 1], [0, 9]], dtype=torch.int32))
    assert torch.equal(device[:, :, [1, 9]], original[:, :, [8, 2]])


def test_no_pairs() -> None:
    tensor = cache(4, torch.float32, 0)
    expected = tensor.clone()
    ops.copy_blocks(tensor, torch.empty((0, 2), dtype=torch.int32))
    assert torch.equal(tensor, expected)


def test_wrong_arguments_are_named() -> None:
    tensor = cache(4, torch.float32, 0)
    pairs = torch.tensor([[0, 1]], dtype=torch.int32)
    for src, dst, wrong_pairs, field in (
        (tensor, tensor.half(), pairs, "dst torch.float16"),
        (tensor, tensor[:2], pairs, r"dst torch.float32 \[2, 2, 4, 2, 4, 16\]"),
        (tensor, tensor[:, :, ::2], pairs, "dst .* strides"),
        (tensor, tensor, pairs.long(), "pairs torch.int64"),
        (tensor, tensor, pairs[0], r"pairs torch.int32 \[2\]"),
    ):
        with pytest.raises(ValueError, match=f"copy_blocks: expected .*; got .*{field}"):
            ops.swap_blocks(src, dst, wrong_pairs)
