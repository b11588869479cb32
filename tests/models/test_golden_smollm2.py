"""The default model on real prompts: greedy tokens and logits of the paged path against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pagedcore.serve.default_model import ensure_default_model
from tests.reference.paged import PagedModel

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
NUM_TOKENS = 32
LOGITS_TOLERANCE = 1e-3
TIE = 1e-4  # two logits this close may change places by rounding alone


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """OpenMP's threads wait by spinning: next to a busy neighbour, one thread is many times faster than two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [tokenizer(text).input_ids for text in texts]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generate(model: PagedModel, prompts: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Continue all prompts greedily in one batch: the tokens, and the logits [NUM_TOKENS, vocab_size] they came from."""
    rows = [model.add(prompt) for prompt in prompts]
    steps = [model.logits(rows, [len(prompt) for prompt in prompts])]
    for _ in range(NUM_TOKENS - 1):
        for row, logits in zip(rows, steps[-1], strict=True):
            row.token_ids.append(int(logits.argmax()))
        steps.append(model.logits(rows, [1] * len(rows)))
    logits = torch.stack(steps, dim=1)
    return logits.argmax(dim=2).tolist(), list(logits)


@torch.inference_mode()
def teacher_forced(reference: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """transformers' logits [len(output), vocab_size] at the positions that `output` was drawn from."""
    ids = torch.tensor([prompt + output[:-1]])
    logits: torch.Tensor = reference(ids, logits_to_keep=len(output)).logits
    return logits[0].float()


def test_greedy_tokens_and_logits_equal_transformers_in_float32(
    folder: Path, prompts: list[list[int]], reference: Any
) -> None:
    """Given the tokens so far, each next token is transformers' own argmax: by induction, its greedy continuation.

    Where its two best logits are closer than rounding can tell apart, either token counts.
    """
    assert len(prompts) == 50
    tokens, logits = generate(PagedModel(folder, torch.float32, block_size=16, num_blocks=1024), prompts)
    num_ties = 0
    for prompt, output, ours in zip(prompts, tokens, logits, strict=True):
        theirs = teacher_forced(reference, prompt, output)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGITS_TOLERANCE)
        best = theirs.topk(2).values
        differs = theirs.argmax(dim=1) != torch.tensor(output)
        assert not (differs & (best[:, 0] - best[:, 1] > TIE)).any()
        num_ties += int(differs.sum())
    print(f"{num_ties} of {len(prompts) * NUM_TOKENS} tokens are ties")
