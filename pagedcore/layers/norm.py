"""Normalization of the hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from pagedcore import ops
from pagedcore.layers.linear import Placement, WeightSlot


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, equation 4), with the residual addition before it fused in."""

    def __init__(self, size: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self.eps = eps
        self.weight = placement.empty(size)

    def weight_slots(self, name: str) -> Iterator[tuple[str, WeightSlot]]:
        yield f"{name}.weight", WeightSlot(self.weight, tuple(self.weight.shape))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        """x, residual, out: [num_tokens, size]. With a residual: residual += x, out = norm(residual)."""
        return ops.rms_norm(x, self.weight, self.eps, residual, out)


class LayerNorm(nn.Module):
    """(x - mean(x)) / deviation(x) * weight + bias (Ba et al., equation 4), with the residual addition before it fused in."""

    def __init__(self, size: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self.eps = eps
        self.weight = placement.empty(size)
        self.bias = placement.empty(size)

    def weight_slots(self, name: str) -> Iterator[tuple[str, WeightSlot]]:
        yield f"{name}.weight", WeightSlot(self.weight, tuple(self.weight.shape))
        yield f"{name}.bias", WeightSlot(self.bias, tuple(self.bias.shape))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        """x, residual, out: [num_tokens, size]. With a residual: residual += x, out = norm(residual); out may be it."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual, out)
