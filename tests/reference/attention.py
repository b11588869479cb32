"""Attention over a paged KV cache, the slow and plain way in float64, and random batches to try it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """The arguments of `ops.paged_attention`. Every slot that no row's table reaches below its seq_len holds NaN.

    keys, values: of each row, [seq_len, num_kv_heads, head_dim]: what the cache holds, without the paging.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def max_query_len(self) -> int:
        return int(self.query_start_loc.diff().max())

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)


def random_batch(
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    unused_tokens: int = 0,
) -> PagedBatch:
    """Rows with shuffled block tables. `unused_tokens` queries, NaN, lie behind the last row's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    keys = [normal(seq_len, num_kv_heads, head_dim) for seq_len in seq_lens]
    values = [normal(seq_len, num_kv_heads, head_dim) for seq_len in seq_lens]
    q = normal(sum(query_lens) + unused_tokens, num_heads, head_dim)
    q[sum(query_lens) :] = torch.nan
    return paged(q, keys, values, query_lens, block_size, seed)


def paged(
    q: Tensor, keys: list[Tensor], values: list[Tensor], query_lens: Sequence[int], block_size: int, seed: int = 0
) -> PagedBatch:
    """Put rows' keys and values into blocks in random order. Block 0 stays unused: it is what padded tables name."""
    num_blocks = [-(-len(row) // block_size) for row in keys]
    free = (torch.randperm(sum(num_blocks) + 2, generator=torch.Generator().manual_seed(seed)) + 1).int()
    block_tables = torch.zeros(len(keys), max(num_blocks) + 1, dtype=torch.int32)
    _, num_kv_heads, head_dim = keys[0].shape
    k_cache = torch.full((len(free) + 1, num_kv_heads, block_size, head_dim), torch.nan, dtype=q.dtype)
    v_cache = k_cache.clone()
    for row, count in enumerate(num_blocks):
        taken, free = free[:count], free[count:]
        block_tables[row, :count] = taken
        position = torch.arange(len(keys[row]))
        slots = (taken[position // block_size].long(), slice(None), position % block_size)
        k_cache[slots] = keys[row]
        v_cache[slots] = values[row]
    query_start_loc = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor([len(row) for row in keys], dtype=torch.int32)
    return PagedBatch(q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, keys, values)


def attend(batch: PagedBatch) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v of each row over the tokens it has so far, in float64.

    Returns the output [num_tokens, num_heads, head_dim], zero behind the last row, and the same with |v| in the place of v:
    the size of what was summed, which rounding errors are proportional to.
    """
    num_heads = batch.q.shape[1]
    out = torch.zeros(batch.q.shape, dtype=torch.float64)
    size = torch.zeros(batch.q.shape, dtype=torch.float64)
    for row, (k, v) in enumerate(zip(batch.keys, batch.values, strict=True)):
        begin, end = batch.query_start_loc[row : row + 2].tolist()
        group = num_heads // k.shape[1]
        k, v = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        scores = batch.q[begin:end].double().transpose(0, 1) @ k.transpose(1, 2) * batch.scale
        query_position = torch.arange(k.shape[1] - (end - begin), k.shape[1])
        future = torch.arange(k.shape[1])[None, :] > query_position[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        out[begin:end] = (weights @ v).transpose(0, 1)
        size[begin:end] = (weights @ v.abs()).transpose(0, 1)
    return out, size
