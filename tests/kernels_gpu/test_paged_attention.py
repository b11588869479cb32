"""Paged attention on the GPU against a float64 reference: ragged batches, shuffled tables, NaN in every unused slot."""

from __future__ import annotations

import pytest
import torch

from pagedcore import ops
from tests.kernels_gpu.attention_cases import Batch, Shape, assert_close, make_batch, run, workspace_for

pytestmark = pytest.mark.gpu

LENGTHS = [1, 15, 16, 17, 63, 64, 65, 128, 500, 2048, 3000]
SHAPES = [
    Shape(32, 8, 128),
    Shape(32, 32, 128),
    Shape(16, 8, 128, dtype=torch.float16),
    Shape(9, 3, 64),
    Shape(14, 2, 64, block_size=32),
    Shape(10, 2, 80, block_size=32, dtype=torch.float16),
    Shape(12, 12, 96, block_size=64),
    Shape(4, 1, 256),
    Shape(32, 2, 128, block_size=64),
    Shape(24, 1, 128, block_size=32, dtype=torch.float16),
    Shape(16, 1, 256, block_size=64, dtype=torch.float16),
]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_matches_the_reference(shape: Shape, batch_invariant: bool) -> None:
    for batch_size in (1, 2, 7, 40):
        lengths = [LENGTHS[(3 * i + batch_size) % len(LENGTHS)] for i in range(batch_size)]
        batch = make_batch(shape, [(1, length) for length in lengths], seed=batch_size)
        assert_close(run(batch, batch_invariant=batch_invariant), batch)


def test_decode_of_one_long_sequence_beside_short_ones() -> None:
    batch = make_batch(Shape(32, 8, 128), [(1, 3), (1, 70000), *((1, 400 + i) for i in range(12))])
    assert_close(run(batch), batch)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_decode_of_more_rows_than_threads(batch_invariant: bool) -> None:
    batch = make_batch(Shape(4, 2, 64), [(1, 1 + 7 * i % 90) for i in range(700)])
    assert_close(run(batch, batch_invariant=batch_invariant), batch)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_and_mixed_batches_match_the_reference(shape: Shape, batch_invariant: bool) -> None:
    batches = [
        [(1, 1), (2, 2), (17, 17), (1, 300), (64, 700), (129, 129), (33, 40)],
        [(300, 300)],
        [(5, 1000), (1, 1000), (200, 1111)],
    ]
    for seed, rows in enumerate(batches):
        batch = make_batch(shape, rows, seed=seed)
        assert_close(run(batch, batch_invariant=batch_invariant), batch)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_padding_is_zero_and_changes_nothing(batch_invariant: bool) -> None:
    shape = Shape(32, 8, 128)
    for rows in ([(1, 100), (1, 0), (1, 900), (0, 0)], [(30, 100), (4, 0), (1, 900), (0, 0)]):
        batch = make_batch(shape, rows, spare_tokens=3)
        out = run(batch, batch_invariant=batch_invariant)
        assert_close(out, batch)
        assert (out[-3:] == 0).all()


def test_repeats_bit_for_bit_with_a_reused_workspace() -> None:
    shape = Shape(32, 8, 128)
    workspace = workspace_for(shape)
    for rows in ([(1, 5000)], [(1, 700 + 31 * i) for i in range(33)], [(600, 900), (1, 5000), (90, 90)]):
        batch = make_batch(shape, rows)
        first = run(batch, workspace)
        assert all(torch.equal(first, run(batch, workspace)) for _ in range(20))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_one_graph_serves_any_lengths(batch_invariant: bool) -> None:
    shape = Shape(16, 8, 128)
    batch = make_batch(shape, [(1, 4000), (1, 3000), (1, 17)])
    workspace = workspace_for(shape)
    out = torch.empty_like(batch.q, memory_format=torch.contiguous_format)

    def launch() -> None:
        tables, starts = batch.block_tables, batch.query_start_loc
        caches = (batch.k_cache, batch.v_cache)
        lengths, scale = batch.seq_lens, batch.scale
        ops.paged_attention(out, batch.q, *caches, tables, starts, lengths, 1, scale, workspace, batch_invariant)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for lengths in ([4000, 3000, 17], [1, 2999, 16], [129, 1, 1]):
        batch.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        shorter = Batch(**{**vars(batch), "rows": [(1, length) for length in lengths]})
        assert_close(out, shorter)
