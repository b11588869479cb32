"""The table of token embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from pagedcore.layers.linear import Placement, WeightSlot


class Embedding(nn.Module):
    """Maps token ids to vectors; whole on every rank."""

    def __init__(self, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.weight = placement.empty(vocab_size, hidden_size)

    def weight_slots(self, name: str) -> Iterator[tuple[str, WeightSlot]]:
        yield f"{name}.weight", WeightSlot(self.weight, tuple(self.weight.shape))

    def forward(self, token_ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """token_ids: [num_tokens] int32 -> out: [num_tokens, hidden_size]."""
        return torch.index_select(self.weight, 0, token_ids, out=out)
