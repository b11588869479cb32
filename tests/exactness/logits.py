"""How far our logits and those of transformers in a dtype are from transformers' in float32, given the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tests.exactness.reference import Continuation
from tests.reference.paged import PagedModel


@dataclass(frozen=True)
class Errors:
    """Of logits: their mean and largest distance from transformers' float32."""

    mean: float
    largest: float


def errors(
    folder: Path, dtype: torch.dtype, continuations: Sequence[Continuation], num_tokens: int
) -> tuple[Errors, Errors]:
    """Ours, each prompt prefilled whole and its continuation decoded one by one in a batch, and those of transformers."""
    exact = _transformers(folder, torch.float32, continuations, num_tokens)
    ours = _ours(folder, dtype, continuations, num_tokens)
    return _errors(ours, exact), _errors(_transformers(folder, dtype, continuations, num_tokens), exact)


def _errors(logits: torch.Tensor, exact: torch.Tensor) -> Errors:
    distance = (logits - exact).abs()
    return Errors(float(distance.mean()), float(distance.max()))


@torch.inference_mode()
def _transformers(
    folder: Path, dtype: torch.dtype, continuations: Sequence[Continuation], num_tokens: int
) -> torch.Tensor:
    """[continuations, num_tokens, vocab_size]"""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    texts = [continuation.prompt_token_ids + continuation.token_ids[: num_tokens - 1] for continuation in continuations]
    return torch.stack([model(torch.tensor([ids]), logits_to_keep=num_tokens).logits[0].float() for ids in texts])


def _ours(folder: Path, dtype: torch.dtype, continuations: Sequence[Continuation], num_tokens: int) -> torch.Tensor:
    model = PagedModel(folder, dtype, block_size=16, num_blocks=1024)
    rows = [model.add(continuation.prompt_token_ids + continuation.token_ids) for continuation in continuations]
    steps = [model.logits(rows, [len(continuation.prompt_token_ids) for continuation in continuations])]
    steps += [model.logits(rows, [1] * len(rows)) for _ in range(num_tokens - 1)]
    return torch.stack(steps, dim=1)
