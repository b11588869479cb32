"""Drawing tokens and log probabilities against float64 references that sort, on every instruction set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pagedcore import _kernels, ops
from tests.reference import sampling
from tests.reference.sampling import Draw

VOCAB_SIZES = (1, 3, 63, 64, 65, 1000, 49152)
FILTERS = (
    Draw(),
    Draw(temperature=0.3),
    Draw(temperature=7.0),
    Draw(top_k=1),
    Draw(top_k=20),
    Draw(top_k=10**6),
    Draw(top_p=0.5),
    Draw(top_p=0.95, temperature=1.5),
    Draw(top_p=1e-6),
    Draw(min_p=0.05),
    Draw(top_k=12, top_p=0.8),
    Draw(top_k=40, top_p=0.9, min_p=0.1, temperature=2.0),
)


def draw_tokens(logits: npt.NDArray[np.float32], draws: Sequence[Draw]) -> npt.NDArray[np.int32]:
    """One token for each draw: of its own row of logits, or of the only row there is."""
    rows = torch.from_numpy(np.atleast_2d(logits)).expand(len(draws), -1)
    parameters = torch.from_numpy(np.stack([draw.pack() for draw in draws]))
    tokens: npt.NDArray[np.int32] = ops.sample(rows, parameters).numpy()
    return tokens


def draw_many(logits: npt.NDArray[np.float32], draw: Draw, seeds: range, draw_indices: range) -> npt.NDArray[np.int32]:
    """Tokens of one row of logits for many seeds or draw indices (the other range has one element)."""
    parameters = np.tile(draw.pack(), (len(seeds) * len(draw_indices), 1))
    parameters[:, 4], parameters[:, 6] = seeds, draw_indices
    rows = torch.from_numpy(logits).expand(len(parameters), -1)
    tokens: npt.NDArray[np.int32] = ops.sample(rows, torch.from_numpy(parameters)).numpy()
    return tokens


def with_(draw: Draw, seed: int, draw_index: int = 0) -> Draw:
    return Draw(draw.temperature, draw.top_k, draw.top_p, draw.min_p, seed, draw_index)


def test_reference_philox_known_answers() -> None:
    """The vectors that Random123 publishes (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    for counter, key, answer in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert tuple(sampling.philox(counter, key).tolist()) == answer


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_draws_equal_the_reference(instruction_set: str, vocab_size: int) -> None:
    """Token for token; two scores of the reference closer than fp32 tells apart do not count, and must be rare."""
    rng = np.random.default_rng(vocab_size)
    num_close = 0
    cases = [
        with_(draw, int(rng.integers(2**64, dtype=np.uint64)), int(rng.integers(2**31)))
        for draw in FILTERS * (2 if vocab_size > 10000 else 20)
    ]
    logits = rng.normal(0.0, 3.0, (len(cases), vocab_size)).astype(np.float32)
    for row, draw, token in zip(logits, cases, draw_tokens(logits, cases).tolist(), strict=True):
        scores = sampling.scores(row, draw)
        best = int(scores.argmax())
        if token != best:
            assert scores[token] > scores[best] - 1e-5, draw
            num_close += 1
    assert num_close <= len(cases) // 50


def test_a_flat_distribution_over_a_million_tokens_takes_the_smallest_uniform() -> None:
    """The smallest of 2^20 uniforms and its neighbours lie closer together than fp32 tells 1 - u apart."""
    vocab_size = 2**20
    tokens = draw_many(np.zeros(vocab_size, np.float32), Draw(), range(5, 6), range(40))
    blocks = np.arange(vocab_size // 4, dtype=np.uint64)
    for draw_index, token in enumerate(tokens.tolist()):
        uniforms = sampling.philox((blocks, draw_index, 0, 0), (5, 0)).T.reshape(-1) >> np.uint64(1)
        assert uniforms[token] <= uniforms.min() * (1 + 1e-6)


@pytest.mark.parametrize("draw", FILTERS, ids=str)
def test_every_kept_token_is_drawn_and_no_other(instruction_set: str, draw: Draw) -> None:
    rng = np.random.default_rng(5)
    logits = rng.uniform(-1.5, 1.5, 48).astype(np.float32) * min(draw.temperature, 1.0)
    logits[7] = -np.inf
    expected = sampling.kept(logits, draw)
    for slack in (-5e-7, 5e-7):
        assert (sampling.kept(logits, draw, slack) == expected).all(), "a threshold is too close to tell"
    tokens = draw_many(logits, draw, range(3, 4), range(30_000))
    assert set(tokens.tolist()) == set(np.flatnonzero(expected).tolist())


@pytest.mark.parametrize("draw", [Draw(top_k=3), Draw(top_p=0.55), Draw(min_p=0.3)], ids=str)
def test_ties_at_a_threshold_are_kept(instruction_set: str, draw: Draw) -> None:
    logits = np.array([1.0, 0.0, 2.0, 1.0, 1.0, -1.0, 2.0, 1.0], np.float32)
    tokens = draw_many(logits, draw, range(11, 12), range(2000))
    assert set(tokens.tolist()) == {0, 2, 3, 4, 6, 7}


def test_a_long_tail_of_unlikely_tokens_counts_in_top_p(instruction_set: str) -> None:
    logits = np.full(49152, -12.0, np.float32)
    logits[7] = 0.0
    share = 1 / (1 + 49151 * np.exp(-12.0))  # of token 7: about 0.77; of any other: less than 1e-5
    assert set(draw_many(logits, Draw(top_p=share - 0.001), range(1), range(100)).tolist()) == {7}
    tokens = draw_many(logits, Draw(top_p=share + 0.001), range(1), range(100))
    assert len(set(tokens.tolist())) > 10


MIXES = tuple(
    Draw(temperature, top_k, top_p, min_p)
    for temperature, top_k, top_p, min_p in (
        (1.0, 0, 1.0, 0.0),
        (0.3, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (7.0, 0, 1.0, 0.0),
        (1.0, 2, 1.0, 0.0),
        (1.0, 7, 1.0, 0.0),
        (2.0, 50, 1.0, 0.0),
        (0.5, 99, 1.0, 0.0),
        (1.0, 1000, 1.0, 0.0),
        (1.0, 0, 0.3, 0.0),
        (1.0, 0, 0.75, 0.0),
        (1.5, 0, 0.95, 0.0),
        (0.4, 0, 0.999, 0.0),
        (1.0, 0, 1.0, 0.02),
        (1.0, 0, 1.0, 0.3),
        (3.0, 0, 1.0, 0.1),
        (1.3, 25, 0.9, 0.0),
        (0.8, 10, 0.6, 0.0),
        (2.5, 60, 0.99, 0.0),
        (1.0, 30, 1.0, 0.05),
        (0.7, 5, 1.0, 0.01),
        (1.0, 0, 0.9, 0.05),
        (2.0, 0, 0.8, 0.2),
        (2.0, 40, 0.9, 0.1),
        (1.1, 15, 0.97, 0.001),
    )
)


@pytest.mark.parametrize("draw", MIXES, ids=str)
@pytest.mark.parametrize("vary_seed", [False, True], ids=["by draw", "by seed"])
def test_distribution(draw: Draw, vary_seed: bool) -> None:
    """Chi-square over 200,000 draws, by draw index or by seed."""
    rng = np.random.default_rng(9)
    logits = rng.normal(0.0, 2.0, 100).astype(np.float32)
    num_draws = 200_000
    seeds, draw_indices = (range(num_draws), range(1)) if vary_seed else (range(1234, 1235), range(num_draws))
    counts = np.bincount(draw_many(logits, draw, seeds, draw_indices), minlength=len(logits))
    expected = sampling.probabilities(logits, draw) * num_draws
    assert not counts[expected == 0].any()
    common = expected >= 5
    chi_square = float((((counts - expected) ** 2)[common] / expected[common]).sum())
    rest = expected[(expected > 0) & ~common].sum()
    degrees = int(common.sum()) - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)
    assert abs(counts[~common].sum() - rest) <= 4 * np.sqrt(rest + 1)


def test_greedy_takes_the_lowest_id_of_the_largest(instruction_set: str) -> None:
    rng = np.random.default_rng(2)
    for vocab_size in VOCAB_SIZES:
        logits = rng.integers(-3, 3, (40, vocab_size)).astype(np.float32)
        tokens = draw_tokens(logits, [Draw(temperature=0.0)] * 40)
        assert (tokens == logits.argmax(1)).all()
    zeros = np.array([-1.0, -0.0, 0.0], np.float32)
    assert draw_tokens(zeros, [Draw(temperature=0.0)]).tolist() == [1]


def test_rows_without_a_distribution_draw_minus_one(instruction_set: str) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(12, 777)).astype(np.float32)
    draws = [Draw(temperature=0.0), Draw(), Draw(top_k=5, top_p=0.9)] * 4
    alone = draw_tokens(logits, draws)
    assert (alone >= 0).all()
    broken = {1: np.nan, 3: np.inf, 5: -np.nan, 8: np.nan}
    for row, value in broken.items():
        logits[row, 700] = value
    logits[9:] = -np.inf
    tokens = draw_tokens(logits, draws)
    bad = [*broken, 9, 10, 11]
    assert (tokens[bad] == -1).all()
    good = [row for row in range(12) if row not in bad]
    assert (tokens[good] == alone[good]).all()


def test_banned_entries_are_never_drawn(instruction_set: str) -> None:
    logits = np.full(130, -np.inf, np.float32)
    logits[[5, 129]] = -3.0, -4.0
    for draw in FILTERS:
        tokens = draw_many(logits, draw, range(300), range(1))
        assert set(tokens.tolist()) <= {5, 129}


def test_draws_do_not_depend_on_neighbours_threads_or_processor(instruction_set: str, restore_threads: None) -> None:
    rng = np.random.default_rng(4)
    draws = [with_(draw, seed, 7) for seed, draw in enumerate(FILTERS * 3)]
    logits = rng.normal(0.0, 4.0, (len(draws), 5000)).astype(np.float32)
    ops.set_num_threads(1)
    alone = [int(draw_tokens(row, [draw])[0]) for row, draw in zip(logits, draws, strict=True)]
    for threads in (1, 2, 5):
        ops.set_num_threads(threads)
        assert draw_tokens(logits, draws).tolist() == alone
        assert draw_tokens(logits[::-1].copy(), draws[::-1]).tolist() == alone[::-1]
    _kernels.cpu.set_isa_for_testing("generic")
    assert draw_tokens(logits, draws).tolist() == alone


@pytest.mark.parametrize("num_top", [0, 1, 7, 63])
@pytest.mark.parametrize("vocab_size", [63, 1000, 49152])
def test_logprobs(instruction_set: str, vocab_size: int, num_top: int) -> None:
    rng = np.random.default_rng(num_top)
    logits = rng.normal(0.0, 5.0, (4, vocab_size)).astype(np.float32)
    logits[1] = logits[1].round()  # many ties
    logits[2, ::2] = -np.inf
    chosen_ids = np.array([vocab_size - 1, 17, 33, int(logits[3].argmax())], np.int32)
    chosen, rank, top, top_ids = (
        result.numpy() for result in ops.logprobs(torch.from_numpy(logits), torch.from_numpy(chosen_ids), num_top)
    )
    for row in range(4):
        expected = sampling.log_softmax(logits[row])
        order = np.argsort(-logits[row], kind="stable")  # equal values by id
        assert chosen[row] == pytest.approx(expected[chosen_ids[row]], abs=2e-5)
        assert order[rank[row] - 1] == chosen_ids[row]
        num_finite = int(np.isfinite(logits[row]).sum())
        assert top_ids[row, :num_finite].tolist() == order[:num_finite][:num_top].tolist()
        np.testing.assert_allclose(top[row, :num_finite], expected[order[:num_finite][:num_top]], atol=2e-5)
        assert (top_ids[row, num_finite:] == -1).all() and (top[row, num_finite:] == -np.inf).all()
        if rank[row] <= num_top:
            assert top[row, rank[row] - 1] == chosen[row]


def test_logprobs_are_the_same_bits_on_every_processor(instruction_set: str) -> None:
    """And so are the weights and Gumbel variables, whose last bits a draw does not show: they share the arithmetic."""
    rng = np.random.default_rng(6)
    logits = torch.from_numpy(rng.normal(0.0, 2.0, (50, 3000)).astype(np.float32))
    token_ids = torch.arange(50, dtype=torch.int32)
    results = ops.logprobs(logits, token_ids, 5)
    _kernels.cpu.set_isa_for_testing("generic")
    for here, generic in zip(results, ops.logprobs(logits, token_ids, 5), strict=True):
        assert torch.equal(here, generic)


def test_logprobs_of_a_row_without_a_token(instruction_set: str) -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(3, 100)).astype(np.float32))
    intact = ops.logprobs(logits, torch.tensor([5, 6, 7], dtype=torch.int32), 3)
    logits[0, 50] = torch.nan
    broken = ops.logprobs(logits, torch.tensor([5, -1, 7], dtype=torch.int32), 3)
    chosen, rank, top, top_ids = broken
    assert chosen[:2].isnan().all() and top[:2].isnan().all()
    assert rank[:2].tolist() == [0, 0] and (top_ids[:2] == -1).all()
    for with_neighbours, alone in zip(broken, intact, strict=True):
        assert torch.equal(with_neighbours[2], alone[2])


def test_rows_may_be_strided(instruction_set: str) -> None:
    rng = np.random.default_rng(8)
    wide = torch.from_numpy(rng.normal(size=(6, 300)).astype(np.float32))
    view = wide[::2, 10:211]
    draws = [with_(draw, 1) for draw in FILTERS[:3]]
    parameters = torch.from_numpy(np.stack([draw.pack() for draw in draws]))
    tokens = ops.sample(view, parameters)
    assert torch.equal(tokens, ops.sample(view.contiguous(), parameters))
    for strided, compact in zip(ops.logprobs(view, tokens, 4), ops.logprobs(view.contiguous(), tokens, 4), strict=True):
        assert torch.equal(strided, compact)
