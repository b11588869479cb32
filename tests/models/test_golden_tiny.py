"""Tiny random models: logits of the paged path against Hugging Face transformers, float32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from tests.reference.paged import PagedModel, Row

LENGTHS = (1, 7, 8, 33, 90)
TOLERANCE = 1e-4  # float32 rounding comes to about a tenth of it


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_logits_equal_transformers_in_random_chunks_and_mixes(variant: str, tmp_path: Path) -> None:
    rng = random.Random(variant)
    reference = tiny.make(variant, tmp_path)
    prompts = [[rng.randrange(tiny.VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    with torch.inference_mode():
        expected = [reference(torch.tensor([prompt])).logits[0] for prompt in prompts]
    model = PagedModel(tmp_path, torch.float32, block_size=rng.choice((1, 4, 16)))
    for _ in range(4):
        _check_random_walk(model, prompts, expected, rng)


def _check_random_walk(
    model: PagedModel, prompts: list[list[int]], expected: list[torch.Tensor], rng: random.Random
) -> None:
    """Compute all prompts to their ends: in each step a random subset of rows, each a random distance further."""
    rows = [(model.add(prompt), want) for prompt, want in zip(prompts, expected, strict=True)]
    open_rows = list(rows)
    while open_rows:
        batch = rng.sample(open_rows, rng.randint(1, len(open_rows)))
        sizes = [_chunk(row, rng) for row, _ in batch]
        logits = model.logits([row for row, _ in batch], sizes)
        for got, (row, want) in zip(logits, batch, strict=True):
            torch.testing.assert_close(got, want[row.num_computed - 1], rtol=0, atol=TOLERANCE)
        open_rows = [(row, want) for row, want in open_rows if row.num_computed < len(row.token_ids)]
    for row, _ in rows:
        model.blocks.release(row.seq_id)


def _chunk(row: Row, rng: random.Random) -> int:
    left = len(row.token_ids) - row.num_computed
    return rng.choice((1, rng.randint(1, left), left))
