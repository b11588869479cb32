"""Packed weights that share memory, and the request for huge pages."""

from __future__ import annotations

from itertools import pairwise

import torch

from pagedcore import ops


def test_weights_in_one_arena_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    arena = ops.WeightArena()
    weights = [torch.randn(n, k, generator=generator) for n, k in ((33, 7), (64, 64), (5, 1000), (1, 1), (300, 48))]
    packed = [ops.pack_linear(weight, arena) for weight in weights]
    for weight, shared in zip(weights, packed, strict=True):
        x = torch.randn(3, weight.shape[1], generator=generator)
        assert torch.equal(ops.packed_linear(x, shared), ops.packed_linear(x, ops.pack_linear(weight)))


def test_an_arena_begins_a_slab_when_one_is_full() -> None:
    arena = ops.WeightArena()
    sizes = (100 << 20, 1, 40 << 20, 30 << 20, 63)
    parts = [arena.take(size) for size in sizes]
    spans = sorted((part.data_ptr(), part.data_ptr() + len(part)) for part in parts)
    assert [len(part) for part in parts] == list(sizes)
    assert all(begin % 64 == 0 for begin, _ in spans)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 3


def test_huge_pages_may_be_requested_for_any_tensor() -> None:
    for size in (0, 1, 4095, 3 << 20):
        tensor = torch.arange(size + 1, dtype=torch.int32)[1:]
        ops.request_huge_pages(tensor)
        assert torch.equal(tensor, torch.arange(1, size + 1, dtype=torch.int32))
