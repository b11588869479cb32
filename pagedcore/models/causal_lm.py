"""What the loader and the runner need of a model, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pagedcore.layers.activations import ActivationBuffers, Activations, LastActivations
from pagedcore.layers.attention import AttentionInputs, LayerKVCache
from pagedcore.layers.embedding import Embedding
from pagedcore.layers.linear import Linear, LMHead, WeightSlot
from pagedcore.models.config import ModelConfig


class CausalLM(nn.Module, ABC):
    """A decoder with its head. Weights are uninitialized until the loader fills them.

    A step is `embed`, `forward`, then `head` on the last tokens of its rows. `forward` and `head` consist of calls of
    `pagedcore.ops` on buffers alone, so that on a CPU they can be captured and replayed.
    """

    embed_tokens: Embedding
    lm_head: LMHead

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        packed = sum(linear.packed.data.nbytes for linear in linears if linear.packed is not None)
        return packed + sum(weight.nbytes for weight in self.parameters())

    @abstractmethod
    def weight_slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """The checkpoint's tensor names and where each goes; a tied head has none of its own."""

    @abstractmethod
    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor, buffers: ActivationBuffers) -> None:
        """token_ids, positions [num_tokens] int32 -> `buffers.residual`. May use the other buffers."""

    @abstractmethod
    def forward(self, inputs: AttentionInputs, cache: Sequence[LayerKVCache], activations: Activations) -> None:
        """Run all layers on the embedded tokens; the result is in `residual` and `hidden` of the activations."""

    @abstractmethod
    def head(self, last: LastActivations) -> None:
        """What `forward` left of the rows' last tokens in `last.residual` and `last.hidden` -> `last.logits`."""
