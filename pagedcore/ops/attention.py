"""Operations on the paged KV cache: writing it, attending to it, copying its blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedcore import _kernels
from pagedcore.ops.border import DTYPE_CODES, addresses, fit, refuse, require_cuda, run

_MAX_HEAD_DIM = 256
_MAX_BLOCK_SIZE = 256

_ROTARY_RULE = (
    "qkv [T, (num_heads + 2 * num_kv_heads) * head_dim], caches [num_blocks, num_kv_heads, block_size, head_dim] and norms "
    "[head_dim] of its dtype, positions and slot_mapping int32 [T], cos_sin float32 [num_positions, even, up to head_dim], "
    f"contiguous but for qkv's rows, on one device; head_dim a multiple of 16 up to {_MAX_HEAD_DIM}"
)
_ATTENTION_RULE = (
    "out and q [T, num_heads, head_dim] with heads side by side, caches [num_blocks, num_kv_heads, block_size, head_dim], "
    "num_heads a multiple of num_kv_heads, all of one dtype; block_tables [R, W], query_start_loc [R + 1] and seq_lens [R] "
    f"int32; contiguous, on one device; head_dim a multiple of 16 up to {_MAX_HEAD_DIM}, block_size a power of two up to "
    f"{_MAX_BLOCK_SIZE}, scale above 0"
)
_COPY_RULE = (
    "contiguous caches [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim], equal but for num_blocks, and "
    "contiguous pairs [num_pairs, 2] int32 on the device that copies"
)


def rotary_write_kv(
    qkv: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    """Rotate queries and keys in place and write keys and values into the cache (RoFormer, 3.4.2, on halves as in GPT-NeoX).

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], rows may be strided; q, then k, then v.
    cos_sin: [num_positions, rotary_dim] float32, rotary_dim / 2 cosines, then as many sines; None: no rotation.
    positions, slot_mapping: [num_tokens] int32. A token whose slot is -1 is padding and left alone.
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim] of qkv's dtype.
    q_norm, k_norm: [head_dim] of qkv's dtype: each head is divided by its root mean square and scaled first (Qwen3).
    """
    num_tokens, width = qkv.shape
    cache_shape = k_cache.shape
    block_size = cache_shape[2]
    rotary_dim = 0 if cos_sin is None else cos_sin.shape[1]
    dtype, is_cuda = qkv.dtype, qkv.is_cuda
    if not (
        width == (num_heads + 2 * num_kv_heads) * head_dim
        and cache_shape == v_cache.shape
        and (cache_shape[1], cache_shape[3]) == (num_kv_heads, head_dim)
        and len(positions) == len(slot_mapping) == num_tokens
        and rotary_dim <= head_dim
        and rotary_dim % 2 == 0
        and (q_norm is None or q_norm.shape == (head_dim,))
        and (k_norm is None or k_norm.shape == (head_dim,))
        and dtype in DTYPE_CODES
        and qkv.stride(1) == 1
        and fit(dtype, is_cuda, k_cache, v_cache, q_norm, k_norm)
        and fit(torch.int32, is_cuda, positions, slot_mapping)
        and fit(torch.float32, is_cuda, cos_sin)
        and head_dim % 16 == 0
        and head_dim <= _MAX_HEAD_DIM
    ):
        tensors = {"qkv": qkv, "cos_sin": cos_sin, "positions": positions, "slot_mapping": slot_mapping}
        caches = {"k_cache": k_cache, "v_cache": v_cache, "q_norm": q_norm, "k_norm": k_norm}
        refuse("rotary_write_kv", _ROTARY_RULE, **tensors, **caches, num_heads=num_heads, num_kv_heads=num_kv_heads)
    pointers = addresses(qkv, cos_sin, q_norm, k_norm, k_cache, v_cache, positions, slot_mapping)
    sizes = (qkv.stride(0), num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, block_size)
    run("rotary_write_kv", is_cuda, *pointers, *sizes, norm_eps, DTYPE_CODES[dtype])


def paged_attention(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    workspace: Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    """Causal attention of a ragged batch over a paged KV cache (PagedAttention, Kwon et al. 2023, equation 4).

    out: [num_tokens, num_heads, head_dim], contiguous.
    q: [num_tokens, num_heads, head_dim]; tokens may be strided, so that q can be a view of qkv. Row r has the queries
        [query_start_loc[r], query_start_loc[r + 1]), which are the last ones of its seq_lens[r] tokens.
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim] of q's dtype, block_size a power of two.
    block_tables: [num_rows, table_width] int32. query_start_loc: [num_rows + 1] int32. seq_lens: [num_rows] int32, 0 in padding.
    scale: above 0. workspace: on a GPU, `paged_attention_workspace_bytes` bytes or more, zeroed before its first use; there,
    block_tables, query_start_loc and seq_lens are read before the kernels ahead have ended: only `unpack_step`, torch or a copy
    may write them.
    batch_invariant: on a GPU, a query's output is the same bits in whatever batch and chunk it comes, at the price of a slower
    decode; on the CPU it always is.
    Tokens of padding rows, and those behind the last row, come out as zeros.
    """
    num_tokens, num_heads, head_dim = q.shape
    cache_shape = k_cache.shape
    num_kv_heads, block_size = cache_shape[1], cache_shape[2]
    num_rows, table_width = block_tables.shape
    token_stride, *inner_strides = q.stride()
    dtype, is_cuda = q.dtype, q.is_cuda
    if not (
        out.shape == q.shape
        and v_cache.shape == cache_shape
        and head_dim == cache_shape[3]
        and num_heads % num_kv_heads == 0
        and len(query_start_loc) == num_rows + 1
        and len(seq_lens) == num_rows
        and dtype in DTYPE_CODES
        and inner_strides == [head_dim, 1]
        and fit(dtype, is_cuda, out, k_cache, v_cache)
        and fit(torch.int32, is_cuda, block_tables, query_start_loc, seq_lens)
        and head_dim % 16 == 0
        and head_dim <= _MAX_HEAD_DIM
        and block_size & (block_size - 1) == 0
        and 0 < block_size <= _MAX_BLOCK_SIZE
        and scale > 0
    ):
        floats = {"out": out, "q": q, "k_cache": k_cache, "v_cache": v_cache}
        indices = {"block_tables": block_tables, "query_start_loc": query_start_loc, "seq_lens": seq_lens}
        refuse("paged_attention", _ATTENTION_RULE, **floats, **indices, scale=scale)
    pointers = addresses(out, q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, workspace)
    strides = (0 if workspace is None else workspace.nbytes, token_stride)
    sizes = (num_tokens, num_rows, table_width, num_heads, num_kv_heads, head_dim, block_size, max_query_len)
    run("paged_attention", is_cuda, *pointers, *strides, *sizes, scale, DTYPE_CODES[dtype], batch_invariant)


def paged_attention_workspace_bytes(device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Size of the workspace that `paged_attention` needs on a device; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    require_cuda()
    return _kernels.cuda.paged_attention_workspace_bytes(num_heads, num_kv_heads, head_dim)


def copy_blocks(cache: Tensor, pairs: Tensor) -> None:
    """Copy blocks inside a cache, in all layers, for copy-on-write (PagedAttention, 4.4).

    cache: [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]. pairs: [num_pairs, 2] int32, source block, destination
    block. No block may be both a source and a destination, or a destination twice.
    """
    swap_blocks(cache, cache, pairs)


def swap_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    """Copy blocks from one cache to another, such as between device and (pinned) host memory, in all layers.

    src, dst: [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim], equal but for num_blocks. pairs: as in `copy_blocks`.
    """
    is_cuda = src.is_cuda or dst.is_cuda
    if not (
        src.dim() == dst.dim() == 6
        and src.shape[:2] == dst.shape[:2]
        and src.shape[3:] == dst.shape[3:]
        and pairs.dim() == 2
        and pairs.shape[1] == 2
        and fit(src.dtype, src.is_cuda, src)
        and fit(src.dtype, dst.is_cuda, dst)
        and fit(torch.int32, is_cuda, pairs)
    ):
        refuse("copy_blocks", _COPY_RULE, src=src, dst=dst, pairs=pairs)
    size = src.element_size()
    block_bytes = src.stride(2) * size
    strides = (src.stride(1) * size, block_bytes, dst.stride(1) * size, block_bytes)
    run("copy_blocks", is_cuda, *addresses(src, dst, pairs), *strides, block_bytes, len(pairs), 2 * len(src))
