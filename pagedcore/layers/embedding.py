"""The tables of token and position embeddings."""

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


class PositionEmbedding(nn.Module):
    """Maps positions to learned vectors; whole on every rank.

    The checkpoint's table has `offset` rows in front that no position refers to: they are left out.
    """

    def __init__(self, num_positions: int, hidden_size: int, offset: int, placement: Placement) -> None:
        super().__init__()
        self.offset = offset
        self.weight = placement.empty(num_positions, hidden_size)

    def weight_slots(self, name: str) -> Iterator[tuple[str, WeightSlot]]:
        num_positions, hidden_size = self.weight.shape
        full_shape = (self.offset + num_positions, hidden_size)
        yield f"{name}.weight", WeightSlot(self.weight, full_shape, 0, self.offset)

    def forward(self, positions: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """positions: [num_tokens] int32 -> out: [num_tokens, hidden_size]."""
        return torch.index_select(self.weight, 0, positions, out=out)
