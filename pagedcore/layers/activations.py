"""The buffers a forward pass computes in, allocated once and shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagedcore.layers.linear import Placement
from pagedcore.models.config import ModelConfig


@dataclass(frozen=True)
class Activations:
    """Views of the buffers for one step's tokens; every layer overwrites them."""

    residual: torch.Tensor  # [num_tokens, hidden_size]: the sum of all layers so far
    normed: torch.Tensor  # [num_tokens, hidden_size]: input of attention and MLP
    hidden: torch.Tensor  # [num_tokens, hidden_size]: output of attention and MLP
    qkv: torch.Tensor  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    queries: torch.Tensor  # [num_tokens, num_heads, head_dim], inside qkv
    context: torch.Tensor  # [num_tokens, num_heads, head_dim]
    context_rows: torch.Tensor  # [num_tokens, num_heads * head_dim], the same memory as context
    gate_up: torch.Tensor  # [num_tokens, 2 * intermediate_size]; without columns where the MLP has no gate
    mlp: torch.Tensor  # [num_tokens, intermediate_size]


@dataclass(frozen=True)
class LastActivations:
    """Views of the buffers for the last token of each of one step's rows."""

    residual: torch.Tensor  # [num_rows, hidden_size]
    normed: torch.Tensor  # [num_rows, hidden_size]
    hidden: torch.Tensor  # [num_rows, hidden_size]
    projected: torch.Tensor  # [num_rows, word_embed_proj_dim]; without columns where that is hidden_size
    logits: torch.Tensor  # [num_rows, vocab_size] float32


class ActivationBuffers:
    """Owns the memory of `Activations` for up to `max_tokens` tokens and of `LastActivations` for up to `max_rows` rows.

    Sizes are one tensor-parallel rank's share; hidden states and logits are whole on every rank. `residual`, `hidden`
    [max_tokens, hidden_size] and `embedded` [max_tokens, word_embed_proj_dim] (without columns where that is hidden_size)
    are what a model embeds its tokens in.
    """

    def __init__(self, config: ModelConfig, max_tokens: int, max_rows: int, placement: Placement) -> None:
        self._num_heads = placement.share(config.num_heads, "num_attention_heads")
        self._head_dim = config.head_dim
        query_size = self._num_heads * config.head_dim
        kv_size = placement.share(config.num_kv_heads, "num_key_value_heads") * config.head_dim
        intermediate_size = placement.share(config.intermediate_size, "intermediate_size")

        buffer = placement.buffer
        self.residual, self._normed, self.hidden = (buffer(max_tokens, config.hidden_size) for _ in range(3))
        self._qkv = buffer(max_tokens, query_size + 2 * kv_size)
        self._context = buffer(max_tokens, query_size)
        self._gate_up = buffer(max_tokens, 2 * intermediate_size if config.gated_mlp else 0)
        self._mlp = buffer(max_tokens, intermediate_size)
        projected_size = 0 if config.word_embed_proj_dim == config.hidden_size else config.word_embed_proj_dim
        self.embedded = buffer(max_tokens, projected_size)
        self._last = [buffer(max_rows, config.hidden_size) for _ in range(3)]
        self._projected = buffer(max_rows, projected_size)
        self.logits = buffer(max_rows, config.vocab_size, torch.float32)
        self.max_tokens = max_tokens

    @property
    def num_bytes(self) -> int:
        token_rows = (self.residual, self._normed, self.hidden, self._qkv, self._context, self._gate_up, self._mlp)
        last_rows = (*self._last, self._projected, self.logits)
        return sum(tensor.untyped_storage().nbytes() for tensor in (*token_rows, self.embedded, *last_rows))

    def for_tokens(self, num_tokens: int) -> Activations:
        """Views of the first `num_tokens` rows."""
        qkv = self._qkv[:num_tokens]
        context_rows = self._context[:num_tokens]
        heads = (num_tokens, self._num_heads, self._head_dim)
        return Activations(
            residual=self.residual[:num_tokens],
            normed=self._normed[:num_tokens],
            hidden=self.hidden[:num_tokens],
            qkv=qkv,
            queries=qkv[:, : context_rows.shape[1]].view(heads),
            context=context_rows.view(heads),
            context_rows=context_rows,
            gate_up=self._gate_up[:num_tokens],
            mlp=self._mlp[:num_tokens],
        )

    def gather_last(self, positions: torch.Tensor) -> None:
        """Copy residual and hidden state of the tokens at `positions` [num_rows] int32 to those of `LastActivations`."""
        num_rows = len(positions)
        for source, last in ((self.residual, self._last[0]), (self.hidden, self._last[2])):
            torch.index_select(source, 0, positions, out=last[:num_rows])

    def for_decode(self, num_rows: int) -> LastActivations:
        """As `for_rows`, for rows of one token each: their activations are where the layers left them."""
        residual, normed, hidden = (tensor[:num_rows] for tensor in (self.residual, self._normed, self.hidden))
        return LastActivations(residual, normed, hidden, self._projected[:num_rows], self.logits[:num_rows])

    def for_rows(self, num_rows: int) -> LastActivations:
        """Views of the first `num_rows` rows."""
        residual, normed, hidden = (tensor[:num_rows] for tensor in self._last)
        return LastActivations(residual, normed, hidden, self._projected[:num_rows], self.logits[:num_rows])
