"""The GPU's sampler and log probabilities against the CPU's on the same logits: the same tokens, whatever the filters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pagedcore import ops

pytestmark = pytest.mark.gpu


def rows_of_parameters() -> torch.Tensor:
    """[rows, 8]: every combination of temperature, top-k, top-p and min-p, each row with its own seed and draw."""
    combinations = list(itertools.product((0.0, 0.7, 1.3), (0, 1, 5, 50, 5000), (1.0, 0.9, 0.3), (0.0, 0.05)))
    parameters = np.zeros((len(combinations), 8), np.int32)
    floats = parameters.view(np.float32)
    for row, (temperature, top_k, top_p, min_p) in enumerate(combinations):
        floats[row, [0, 2, 3]] = temperature, top_p, min_p
        parameters[row, [1, 4, 5, 6, 7]] = top_k, 17 * row + 3, row, row % 7, -1
    return torch.from_numpy(parameters)


@pytest.mark.parametrize("vocab_size", [5, 1000, 49152, 128256, 151937])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_draws_the_cpu_kernels_tokens(vocab_size: int, spread: float) -> None:
    parameters = rows_of_parameters()
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(len(parameters), vocab_size, generator=generator) * spread
    logits[:, vocab_size // 2] = logits[:, 1]  # ties
    logits[3::7, : vocab_size // 3] = float("-inf")
    expected = ops.sample(logits, parameters)
    drawn = ops.sample(logits.cuda(), parameters.cuda()).cpu()
    assert torch.equal(drawn, expected), (drawn != expected).nonzero().flatten().tolist()


def test_a_row_without_a_distribution_gives_minus_one() -> None:
    parameters = rows_of_parameters()[[0, 31, 40, 50, 60]]
    logits = torch.randn(5, 3000)
    logits[0, 7] = float("nan")
    logits[1, 2999] = float("inf")
    logits[2] = float("-inf")
    logits[3, 5] = -float("nan")
    expected = ops.sample(logits, parameters)
    assert torch.equal(ops.sample(logits.cuda(), parameters.cuda()).cpu(), expected)
    assert expected.tolist()[:4] == [-1] * 4 and expected[4] >= 0


@pytest.mark.parametrize("vocab_size", [30, 49152, 128257])
def test_log_probabilities(vocab_size: int) -> None:
    logits = torch.randn(23, vocab_size) * 3
    logits[:, 3] = logits[:, 8]
    logits[5, : vocab_size - 4] = float("-inf")
    token_ids = torch.randint(0, vocab_size, (23,), dtype=torch.int32)
    token_ids[0] = -1
    logits[1, 0] = float("nan")
    chosen, rank, top, top_ids = ops.logprobs(logits, token_ids, 20)
    on_gpu = ops.logprobs(logits.cuda(), token_ids.cuda(), 20)
    torch.testing.assert_close(on_gpu[0].cpu(), chosen, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(on_gpu[1].cpu(), rank)
    torch.testing.assert_close(on_gpu[2].cpu(), top, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(on_gpu[3].cpu(), top_ids)
