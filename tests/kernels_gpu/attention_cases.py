"""Ragged paged batches with NaN wherever no token was written, their attention in float64 and on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagedcore import ops


@dataclass(frozen=True)
class Shape:
    """num_heads query heads over num_kv_heads, blocks of block_size slots."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Batch:
    """Inputs of one attention call, on the GPU; `rows` holds (query_len, seq_len) of each row."""

    shape: Shape
    rows: list[tuple[int, int]]
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scale: float


def make_batch(shape: Shape, rows: list[tuple[int, int]], seed: int = 0, spare_tokens: int = 0) -> Batch:
    """Random q, k and v in shuffled blocks; q is a strided view, as in a fused projection; `spare_tokens` belong to no row."""
    generator = torch.Generator("cuda").manual_seed(seed)
    blocks = [-(-seq_len // shape.block_size) for _, seq_len in rows]
    total = sum(blocks) + 3
    cache_shape = (total, shape.num_kv_heads, shape.block_size, shape.head_dim)
    k_cache = torch.full(cache_shape, float("nan"), dtype=shape.dtype, device="cuda")
    v_cache = torch.full(cache_shape, float("nan"), dtype=shape.dtype, device="cuda")
    ids = torch.randperm(total, generator=generator, device="cuda", dtype=torch.int32)
    # Unused table entries point nowhere: reading a block through one of them faults.
    tables = torch.full((len(rows), max(blocks) + 2), 1 << 30, dtype=torch.int32, device="cuda")
    start = 0
    for row, (_, seq_len) in enumerate(rows):
        tables[row, : blocks[row]] = ids[start : start + blocks[row]]
        start += blocks[row]
        tokens = torch.arange(seq_len, device="cuda")
        block, offset = tables[row].long()[tokens // shape.block_size], tokens % shape.block_size
        for cache in (k_cache, v_cache):
            cache[block, :, offset] = torch.randn(
                (seq_len, shape.num_kv_heads, shape.head_dim), generator=generator, device="cuda"
            ).to(shape.dtype)
    num_tokens = sum(query_len for query_len, _ in rows) + spare_tokens
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    qkv = torch.randn((num_tokens, width), generator=generator, device="cuda").to(shape.dtype)
    q = qkv[:, : shape.num_heads * shape.head_dim].view(num_tokens, shape.num_heads, shape.head_dim)
    starts = [0]
    for query_len, _ in rows:
        starts.append(starts[-1] + query_len)
    return Batch(
        shape,
        rows,
        q,
        k_cache,
        v_cache,
        tables,
        torch.tensor(starts, dtype=torch.int32, device="cuda"),
        torch.tensor([seq_len for _, seq_len in rows], dtype=torch.int32, device="cuda"),
        shape.head_dim**-0.5,
    )


def reference(batch: Batch) -> torch.Tensor:
    """The attention output [tokens, heads, head_dim] in float64; zero where a token has nothing to attend to."""
    shape = batch.shape
    out = torch.zeros(batch.q.shape, dtype=torch.float64, device="cuda")
    start = 0
    for row, (query_len, seq_len) in enumerate(batch.rows):
        if query_len > 0 and seq_len > 0:
            tokens = torch.arange(seq_len, device="cuda")
            block, offset = batch.block_tables[row].long()[tokens // shape.block_size], tokens % shape.block_size
            keys, values = (
                cache[block, :, offset].double().repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=1)
                for cache in (batch.k_cache, batch.v_cache)
            )
            query = batch.q[start : start + query_len].double()
            scores = torch.einsum("qhd,khd->hqk", query, keys) * batch.scale
            positions = torch.arange(seq_len - query_len, seq_len, device="cuda")
            scores = scores.masked_fill(tokens[None, None, :] > positions[None, :, None], float("-inf"))
            out[start : start + query_len] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        start += query_len
    return out


def workspace_for(shape: Shape) -> torch.Tensor:
    """Zeros, as many as attention of this shape needs."""
    size = ops.paged_attention_workspace_bytes(
        torch.device("cuda"), shape.num_heads, shape.num_kv_heads, shape.head_dim
    )
    return torch.zeros(size, dtype=torch.uint8, device="cuda")


def run(batch: Batch, workspace: torch.Tensor | None = None, batch_invariant: bool = False) -> torch.Tensor:
    """`ops.paged_attention` of the batch, with a workspace of its own where none is given."""
    out = torch.full(batch.q.shape, float("nan"), dtype=batch.q.dtype, device="cuda")
    shape = batch.shape
    if workspace is None:
        workspace = workspace_for(shape)
    ops.paged_attention(
        out,
        batch.q,
        batch.k_cache,
        batch.v_cache,
        batch.block_tables,
        batch.query_start_loc,
        batch.seq_lens,
        max(query_len for query_len, _ in batch.rows),
        batch.scale,
        workspace,
        batch_invariant,
    )
    torch.cuda.synchronize()
    return out


def assert_close(out: torch.Tensor, batch: Batch) -> None:
    """That every head of every token is as near the reference as its dtype allows."""
    expected = reference(batch)
    assert torch.isfinite(out).all()
    tolerance = 4e-3 if batch.shape.dtype == torch.bfloat16 else 6e-4
    error = (out.double() - expected).norm(dim=-1)
    scale = expected.norm(dim=-1)
    assert (error <= tolerance * scale + 1e-12).all(), (
        f"worst relative error {(error / scale.clamp_min(1e-12)).max():.2e}"
    )
