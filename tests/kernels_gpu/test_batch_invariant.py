"""With `batch_invariant`, a token's bits on the GPU are the same in every batch, at every place and in every chunk."""

from __future__ import annotations

import random

import pytest
import torch

from pagedcore import ops
from pagedcore.execution.invariance import bits_are_alike
from pagedcore.layers.linear import Placement
from tests.kernels_gpu.attention_cases import Batch, Shape, assert_close, make_batch, run

pytestmark = pytest.mark.gpu

# Around the sizes of blocks and of the prefill kernels' tiles.
LENGTHS = [1, 16, 63, 64, 65, 127, 128, 129, 257, 700, 1300, 5000]
SHAPES = [
    Shape(4, 4, 64),
    Shape(8, 2, 64, dtype=torch.float16),
    Shape(16, 2, 64, block_size=32),
    Shape(9, 3, 64),
    Shape(4, 4, 80, dtype=torch.float16),
    Shape(8, 2, 80),
    Shape(8, 1, 80, block_size=64),
    Shape(6, 6, 96),
    Shape(4, 4, 128, block_size=64),
    Shape(8, 2, 128),
    Shape(16, 2, 128, dtype=torch.float16),
    Shape(24, 1, 128),
    Shape(8, 2, 256),
]
CHUNK_SIZES = (1, 1, 2, 17, 64, 127, 128, 300, 1024)

MAX_ROWS = 600
ROW_COUNTS = (1, 2, 3, 8, 31, 32, 33, 64, 127, 128, 129, 200, 255, 256, 257, 400, 511, 512, 513, 600)
# out_features, in_features, dtype, dtype of the result, whether there is a bias
LINEARS = [
    (4096, 1024, torch.bfloat16, torch.bfloat16, False),
    (1024, 3072, torch.float16, torch.float16, False),
    (6144, 4096, torch.bfloat16, torch.bfloat16, True),
    (320, 576, torch.float16, torch.float16, True),
    (49152, 576, torch.bfloat16, torch.float32, False),
    (40960, 256, torch.float16, torch.float32, False),
]

Piece = tuple[int, int, int]  # the queries [begin, end) of a sequence


def pieces_of(batch: Batch, pieces: list[Piece]) -> Batch:
    """The attention of some queries, when no token behind the last of a sequence's has been computed: NaN is there.

    batch: every sequence with a query for each of its tokens.
    """
    caches = batch.k_cache.clone(), batch.v_cache.clone()
    ends: dict[int, int] = {}
    for sequence, _, end in pieces:
        ends[sequence] = max(ends.get(sequence, 0), end)
    for sequence, end in ends.items():
        tokens = torch.arange(end, batch.rows[sequence][1], device="cuda")
        block = batch.block_tables[sequence].long()[tokens // batch.shape.block_size]
        for cache in caches:
            cache[block, :, tokens % batch.shape.block_size] = float("nan")
    starts = batch.query_start_loc.tolist()
    queries = [torch.arange(starts[sequence] + begin, starts[sequence] + end) for sequence, begin, end in pieces]
    rows = [(end - begin, end) for _, begin, end in pieces]
    offsets = torch.tensor([0, *(query_len for query_len, _ in rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Batch(
        batch.shape,
        rows,
        batch.q[torch.cat(queries).cuda()],
        *caches,
        batch.block_tables[torch.tensor([sequence for sequence, _, _ in pieces], device="cuda")],
        offsets.cuda(),
        torch.tensor([end for _, _, end in pieces], dtype=torch.int32, device="cuda"),
        batch.scale,
    )


def num_different(batch: Batch, pieces: list[Piece], whole: list[torch.Tensor], batch_invariant: bool = True) -> int:
    """Outputs of the pieces in one call, in any order, whose bits are not those of their sequences' `whole`."""
    out = run(pieces_of(batch, pieces), batch_invariant=batch_invariant)
    expected = torch.cat([whole[sequence][begin:end] for sequence, begin, end in pieces])
    assert torch.isfinite(out).all()
    return int((out.view(torch.int16) != expected.view(torch.int16)).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_has_the_same_bits_whole_in_chunks_and_query_by_query(shape: Shape) -> None:
    rng = random.Random(0)
    batch = make_batch(shape, [(length, length) for length in LENGTHS])
    everything = [(sequence, 0, length) for sequence, length in enumerate(LENGTHS)]
    whole = [run(pieces_of(batch, [piece]), batch_invariant=True) for piece in everything]
    assert num_different(batch, everything, whole) == 0
    assert num_different(batch, everything[::-1], whole) == 0
    done = [0] * len(LENGTHS)
    while done != LENGTHS:
        chunks = [
            (sequence, begin, min(begin + rng.choice(CHUNK_SIZES), LENGTHS[sequence]))
            for sequence, begin in enumerate(done)
            if begin < LENGTHS[sequence] and rng.random() < 0.9
        ]
        if not chunks:
            continue
        rng.shuffle(chunks)
        assert num_different(batch, chunks, whole) == 0, chunks
        for sequence, _, end in chunks:
            done[sequence] = end
    tokens = [(0, 0), (5, 126), (6, 127), (7, 127), (7, 128), (10, 1299), *((11, i) for i in (0, 64, 2047, 3000, 4999))]
    decoded = [(sequence, token, token + 1) for sequence, token in tokens]
    for piece in decoded:
        assert num_different(batch, [piece], whole) == 0, piece
    crowd = [(11, token, token + 1) for token in range(100, 5000, 13)]
    assert num_different(batch, decoded + crowd, whole) == 0
    assert num_different(batch, [*decoded, (9, 0, 700), *crowd, (8, 256, 257)], whole) == 0
    # The inverse control: rows of one query have a kernel of their own, which cuts their context.
    assert num_different(batch, decoded + crowd, whole, batch_invariant=False) > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_of_chunks_matches_the_reference(shape: Shape) -> None:
    batch = make_batch(shape, [(length, length) for length in LENGTHS], seed=1)
    pieces = [(11, 4800, 4990), (10, 700, 701), (9, 3, 260), (8, 256, 257), (7, 128, 129), (3, 0, 64), (0, 0, 1)]
    part = pieces_of(batch, pieces)
    assert_close(run(part, batch_invariant=True), part)


def buffer(num_rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN, with NaN behind it."""
    placement = Placement(dtype, torch.device("cuda"), batch_invariant=True)
    rows = placement.buffer(num_rows, size)
    return rows.as_strided((ops.invariant_rows(num_rows), size), rows.stride()).fill_(float("nan"))[:num_rows]


@pytest.mark.parametrize(("out_features", "in_features", "dtype", "out_dtype", "has_bias"), LINEARS, ids=str)
def test_linear_layers_give_a_row_the_same_bits_at_every_place(
    out_features: int, in_features: int, dtype: torch.dtype, out_dtype: torch.dtype, has_bias: bool
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def random_tensor(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda").to(dtype)

    x, weight = random_tensor(MAX_ROWS, in_features), random_tensor(out_features, in_features) / in_features**0.5
    bias = random_tensor(out_features) if has_bias else None

    def products(rows: torch.Tensor, batch_invariant: bool = True) -> torch.Tensor:
        given, out = buffer(len(rows), in_features, dtype), buffer(len(rows), out_features, out_dtype)
        linear = ops.invariant_linear if batch_invariant else ops.linear
        return linear(given.copy_(rows), weight, bias, out)

    whole = products(x)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    error = float((whole.double() - exact).norm() / exact.norm())
    assert error < {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}[out_dtype]
    differ = 0
    for count in ROW_COUNTS:
        chosen = torch.randperm(MAX_ROWS, generator=generator, device="cuda")[:count]
        assert torch.equal(products(x[chosen]), whole[chosen]), f"{count} rows"
        differ += not torch.equal(products(x[chosen], batch_invariant=False), whole[chosen])
    for row in (0, 255, 256, 599):
        assert torch.equal(products(x[row : row + 1]), whole[row : row + 1])
        everywhere = products(x[row].repeat(MAX_ROWS, 1))
        assert bits_are_alike(everywhere) and torch.equal(everywhere[:1], whole[row : row + 1])
    assert differ > 0, "the inverse control"


def test_linear_layers_without_room_behind_their_rows_are_refused() -> None:
    x, out = (torch.zeros(257, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"invariant_linear: expected .*, with room for a multiple of 256 rows"):
        ops.invariant_linear(x, weight, None, out)
    roomy = buffer(257, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="invariant_linear: expected"):
        ops.invariant_linear(roomy, weight, None, out)
    ops.invariant_linear(roomy, weight, None, buffer(257, 64, torch.bfloat16))
