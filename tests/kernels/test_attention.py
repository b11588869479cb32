"""Paged attention on every instruction set: against float64, and bitwise against itself when the work is cut differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pagedcore import ops
from tests.reference.attention import PagedBatch, attend, paged, random_batch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 256  # kernels/cpu/attention.h: kAttentionChunk
# (seq_len, query_len): decode, whole prompts, chunks of prompts, an empty padding row, and all that around a chunk's border
ROWS = ((1, 1), (300, 1), (5, 5), (CHUNK, 90), (0, 0), (CHUNK + 1, 1), (2 * CHUNK + 3, 37), (CHUNK + 9, 20))
SEQ_LENS = [seq_len for seq_len, _ in ROWS]
QUERY_LENS = [query_len for _, query_len in ROWS]


def run(batch: PagedBatch) -> Tensor:
    out = torch.full_like(batch.q, 7.0)
    ops.paged_attention(
        out,
        batch.q,
        batch.k_cache,
        batch.v_cache,
        batch.block_tables,
        batch.query_start_loc,
        batch.seq_lens,
        batch.max_query_len,
        batch.scale,
    )
    return out


def check(batch: PagedBatch, instruction_set: str) -> None:
    """An error of one rounding of the output, one of each weight where weights are bfloat16, and some float32 roundings."""
    expected, size = attend(batch)
    dtype = batch.q.dtype
    rounding = torch.finfo(dtype).eps / 2
    weight_rounding = rounding if dtype is torch.bfloat16 and instruction_set == "avx512_bf16" else 0.0
    error = (run(batch).double() - expected).abs()
    assert (error <= rounding * expected.abs() + (weight_rounding + 3e-6) * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (16, 32, 64, 80, 96, 128, 256))
def test_dtypes_and_head_dims(instruction_set: str, head_dim: int, dtype: torch.dtype) -> None:
    check(random_batch(SEQ_LENS, QUERY_LENS, head_dim=head_dim, dtype=dtype, unused_tokens=3), instruction_set)


@pytest.mark.parametrize("group", (1, 2, 3, 4, 7, 8, 16))
def test_query_heads_per_kv_head(instruction_set: str, group: int) -> None:
    for dtype, num_kv_heads in ((torch.float32, 1), (torch.bfloat16, 2)):
        batch = random_batch(
            SEQ_LENS, QUERY_LENS, num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads, dtype=dtype, seed=group
        )
        check(batch, instruction_set)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_block_size_changes_nothing(instruction_set: str, dtype: torch.dtype) -> None:
    batch = random_batch(SEQ_LENS, QUERY_LENS, dtype=dtype)
    check(batch, instruction_set)
    expected = run(batch)
    for block_size in (1, 2, 4, 8, 32, 64, 128, 256):
        assert torch.equal(run(paged(batch.q, batch.keys, batch.values, QUERY_LENS, block_size, block_size)), expected)


def test_rows_that_share_blocks(instruction_set: str) -> None:
    batch = random_batch([100, 100, 70], [1, 40, 1], dtype=torch.bfloat16)
    shared = 3  # blocks
    tables = batch.block_tables.clone()
    tables[1:, :shared] = tables[0, :shared]
    for rows in (batch.keys, batch.values):
        for row in rows[1:]:
            row[: shared * 16] = rows[0][: shared * 16]
    check(replace(batch, block_tables=tables), instruction_set)


def test_queries_inside_qkv(instruction_set: str) -> None:
    batch = random_batch(SEQ_LENS, QUERY_LENS)
    num_tokens, num_heads, head_dim = batch.q.shape
    qkv = torch.full((num_tokens, (num_heads + 4) * head_dim), torch.nan)
    q = qkv[:, : num_heads * head_dim].view(num_tokens, num_heads, head_dim)
    q.copy_(batch.q)
    assert torch.equal(run(replace(batch, q=q)), run(batch))


@pytest.mark.parametrize("cut", ((1,) * 20, (7, 13), (19, 1), (274, 1, 255), (CHUNK, CHUNK, 18)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_chunks_of_a_prompt_are_bitwise_the_whole(
    instruction_set: str, dtype: torch.dtype, cut: tuple[int, ...]
) -> None:
    """Also one token at a time: decoding is prefill by another name."""
    length = 2 * CHUNK + 18
    whole = random_batch([length], [length], dtype=dtype)
    expected = run(whole)
    end = length - sum(cut)
    for query_len in cut:
        begin, end = end, end + query_len
        chunk = paged(whole.q[begin:end], [whole.keys[0][:end]], [whole.values[0][:end]], [query_len], 16, seed=end)
        assert torch.equal(run(chunk), expected[begin:end])


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_neither_neighbours_nor_threads_change_a_bit(instruction_set: str, dtype: torch.dtype) -> None:
    batch = random_batch(SEQ_LENS, QUERY_LENS, dtype=dtype)
    ops.set_num_threads(1)
    expected = run(batch)
    for num_threads in (2, 3):
        ops.set_num_threads(num_threads)
        for _ in range(3):
            assert torch.equal(run(batch), expected)
    for row, query_len in enumerate(QUERY_LENS):
        begin, end = batch.query_start_loc[row : row + 2].tolist()
        alone = paged(batch.q[begin:end], batch.keys[row : row + 1], batch.values[row : row + 1], [query_len], 16, row)
        assert torch.equal(run(alone), expected[begin:end])


def test_scores_far_from_zero(instruction_set: str) -> None:
    """The largest score is above 10,000 and its place among the chunks varies: an exponential must neither overflow nor vanish."""
    for dtype in (torch.float32, torch.bfloat16):
        batch = random_batch([700, 700, 700], [1, 1, 1], dtype=dtype)
        for row, position in enumerate((3, 400, 650)):
            batch.keys[row][position] *= 100.0
        large = paged((batch.q.float() * 100.0).to(dtype), batch.keys, batch.values, [1, 1, 1], 16)
        expected, size = attend(large)
        # A score of 10,000 is rounded by 1e-3, and with it the weights.
        assert ((run(large).double() - expected).abs() <= 0.01 * size).all()


@pytest.mark.parametrize("spoil", ("q", "key", "value"))
def test_nan_stays_in_its_row_and_shows(instruction_set: str, spoil: str) -> None:
    batch = random_batch([300, 300, 40], [1, 20, 40], dtype=torch.bfloat16)
    expected = run(batch)
    begin, end = 1, 21
    q, keys, values = batch.q.clone(), list(batch.keys), list(batch.values)
    if spoil == "q":
        q[begin:end] = torch.nan
    else:
        spoiled = keys if spoil == "key" else values
        spoiled[1] = spoiled[1].clone()
        spoiled[1][2] = torch.nan
    out = run(paged(q, keys, values, [1, 20, 40], 16))
    assert out[begin:end].isnan().all()
    assert torch.equal(out[:begin], expected[:begin])
    assert torch.equal(out[end:], expected[end:])


def test_padding_comes_out_as_zeros(instruction_set: str) -> None:
    """Padding rows may own tokens or none; tokens behind the last row are padding too."""
    batch = random_batch([40, 33], [2, 1], unused_tokens=4)
    padded = replace(
        batch,
        block_tables=torch.cat([batch.block_tables, torch.zeros_like(batch.block_tables)]),
        query_start_loc=torch.tensor([0, 2, 3, 5, 5], dtype=torch.int32),
        seq_lens=torch.tensor([40, 33, 0, 0], dtype=torch.int32),
    )
    out = run(padded)
    assert torch.equal(out[:3], run(batch)[:3])
    assert (out[3:] == 0).all()


def test_no_rows_and_no_tokens() -> None:
    batch = random_batch([4], [1])
    nothing = replace(
        batch,
        q=batch.q[:0],
        block_tables=batch.block_tables[:0],
        query_start_loc=batch.query_start_loc[:1],
        seq_lens=batch.seq_lens[:0],
    )
    out = torch.empty_like(nothing.q)
    ops.paged_attention(
        out,
        nothing.q,
        nothing.k_cache,
        nothing.v_cache,
        nothing.block_tables,
        nothing.query_start_loc,
        nothing.seq_lens,
        0,
        1.0,
    )


@pytest.mark.parametrize(
    ("change", "field"),
    (
        (lambda b: replace(b, q=b.q.double()), "q torch.float64"),
        (lambda b: replace(b, k_cache=b.k_cache.bfloat16()), "k_cache torch.bfloat16"),
        (lambda b: replace(b, v_cache=b.v_cache[:, :, :8].contiguous()), r"v_cache torch.float32 \[\d+, 2, 8, 64\]"),
        (lambda b: replace(b, v_cache=b.v_cache.transpose(1, 2).contiguous().transpose(1, 2)), "strides"),
        (lambda b: replace(b, block_tables=b.block_tables.long()), "block_tables torch.int64"),
        (lambda b: replace(b, query_start_loc=b.query_start_loc[:-1]), r"query_start_loc torch.int32 \[8\]"),
        (lambda b: replace(b, seq_lens=b.seq_lens[:-1]), r"seq_lens torch.int32 \[7\]"),
        (lambda b: replace(b, q=b.q[:, :5]), r"q torch.float32 \[\d+, 5, 64\]"),
    ),
)
def test_wrong_arguments_are_named(change: Callable[[PagedBatch], PagedBatch], field: str) -> None:
    with pytest.raises(ValueError, match=f"paged_attention: expected .*; got .*{field}"):
        run(change(random_batch(SEQ_LENS, QUERY_LENS)))


def test_unsupported_sizes_are_refused() -> None:
    for head_dim, block_size in ((24, 16), (272, 16), (64, 12), (64, 512)):
        with pytest.raises(
            ValueError, match="head_dim a multiple of 16 up to 256, block_size a power of two up to 256"
        ):
            run(random_batch([3], [1], head_dim=head_dim, block_size=block_size))
