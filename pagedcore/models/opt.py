"""OPT (Zhang et al. 2022): learned positions, LayerNorm, an MLP with ReLU, biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pagedcore import ops
from pagedcore.layers.activations import ActivationBuffers, Activations, LastActivations
from pagedcore.layers.attention import Attention, AttentionInputs, LayerKVCache
from pagedcore.layers.embedding import Embedding, PositionEmbedding
from pagedcore.layers.linear import ColumnLinear, Linear, LMHead, Placement, RowLinear, WeightSlot
from pagedcore.layers.norm import LayerNorm
from pagedcore.models.causal_lm import CausalLM
from pagedcore.models.config import ModelConfig

POSITION_OFFSET = 2  # position 0 is row 2 of the checkpoint's table


class MLP(nn.Module):
    """fc2(relu(fc1(x)))."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        hidden_size, size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.fc1 = ColumnLinear(hidden_size, size, bias, placement)
        self.fc2 = RowLinear(size, hidden_size, bias, placement)

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.fc1.weight_slots(f"{prefix}.fc1")
        yield from self.fc2.weight_slots(f"{prefix}.fc2")

    def forward(self, x: torch.Tensor, activations: Activations) -> None:
        """x: [num_tokens, hidden_size] -> `activations.hidden`."""
        self.fc1(x, activations.mlp)
        ops.relu(activations.mlp, activations.mlp)
        self.fc2(activations.mlp, activations.hidden)


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream, with a norm before it or behind the addition (OPT-350m)."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        self.norm_before = config.norm_before
        self.self_attn = Attention(config, None, placement)
        self.self_attn_layer_norm = LayerNorm(config.hidden_size, config.norm_eps, placement)
        self.mlp = MLP(config, placement)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.norm_eps, placement)

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.self_attn.weight_slots(f"{prefix}.self_attn", "out_proj")
        yield from self.self_attn_layer_norm.weight_slots(f"{prefix}.self_attn_layer_norm")
        yield from self.mlp.weight_slots(prefix)
        yield from self.final_layer_norm.weight_slots(f"{prefix}.final_layer_norm")

    def forward(self, inputs: AttentionInputs, cache: LayerKVCache, activations: Activations, first: bool) -> None:
        """Norms before: `residual` and what the layer before left in `hidden`, if any, -> the same of this layer.

        Norms behind: `residual` -> `residual`.
        """
        residual, hidden = activations.residual, activations.hidden
        if self.norm_before:
            normed = activations.normed
            if first:
                self.self_attn_layer_norm(residual, None, normed)
            else:
                self.self_attn_layer_norm(hidden, residual, normed)
            self.self_attn(normed, inputs, cache, activations)
            self.final_layer_norm(hidden, residual, normed)
            self.mlp(normed, activations)
        else:
            self.self_attn(residual, inputs, cache, activations)
            self.self_attn_layer_norm(hidden, residual, residual)
            self.mlp(residual, activations)
            self.final_layer_norm(hidden, residual, residual)


class OPTForCausalLM(CausalLM):
    """The decoder with its head; the projections around the embeddings are OPT-350m's."""

    def __init__(self, config: ModelConfig, max_model_len: int, placement: Placement) -> None:
        super().__init__(config)
        assert max_model_len <= config.max_position_embeddings
        hidden_size, embedding_size = config.hidden_size, config.word_embed_proj_dim
        projected = embedding_size != hidden_size
        self.embed_tokens = Embedding(config.vocab_size, embedding_size, placement)
        self.embed_positions = PositionEmbedding(
            config.max_position_embeddings, hidden_size, POSITION_OFFSET, placement
        )
        self.project_in = Linear(embedding_size, hidden_size, False, placement) if projected else None
        self.layers = nn.ModuleList(DecoderLayer(config, placement) for _ in range(config.num_layers))
        self.final_layer_norm = LayerNorm(hidden_size, config.norm_eps, placement) if config.norm_before else None
        self.project_out = Linear(hidden_size, embedding_size, False, placement) if projected else None
        self.lm_head = LMHead(embedding_size, config.vocab_size, False, placement)

    def weight_slots(self) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.embed_tokens.weight_slots("model.decoder.embed_tokens")
        yield from self.embed_positions.weight_slots("model.decoder.embed_positions")
        if self.project_in is not None and self.project_out is not None:
            yield from self.project_in.weight_slots("model.decoder.project_in")
            yield from self.project_out.weight_slots("model.decoder.project_out")
        for i, layer in enumerate(self.layers):
            yield from layer.weight_slots(f"model.decoder.layers.{i}")  # type: ignore[operator]
        if self.final_layer_norm is not None:
            yield from self.final_layer_norm.weight_slots("model.decoder.final_layer_norm")
        if not self.config.tie_word_embeddings:
            yield from self.lm_head.weight_slots("lm_head")

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor, buffers: ActivationBuffers) -> None:
        num_tokens = len(token_ids)
        residual, hidden = buffers.residual[:num_tokens], buffers.hidden[:num_tokens]
        if self.project_in is None:
            self.embed_tokens(token_ids, residual)
        else:
            self.project_in(self.embed_tokens(token_ids, buffers.embedded[:num_tokens]), residual)
        residual.add_(self.embed_positions(positions, hidden))

    def forward(self, inputs: AttentionInputs, cache: Sequence[LayerKVCache], activations: Activations) -> None:
        for i, layer in enumerate(self.layers):
            layer(inputs, cache[i], activations, i == 0)

    def head(self, last: LastActivations) -> None:
        x = last.residual
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(last.hidden, last.residual, last.normed)
        if self.project_out is not None:
            x = self.project_out(x, last.projected)
        self.lm_head(x, last.logits)
