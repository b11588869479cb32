"""Llama, and the models that differ from it only in biases and query/key norms: Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pagedcore.layers.activations import ActivationBuffers, Activations, LastActivations
from pagedcore.layers.attention import Attention, AttentionInputs, LayerKVCache
from pagedcore.layers.embedding import Embedding
from pagedcore.layers.linear import GateUpLinear, LMHead, Placement, RowLinear, WeightSlot
from pagedcore.layers.norm import RMSNorm
from pagedcore.layers.rotary import rotary_table
from pagedcore.models.causal_lm import CausalLM
from pagedcore.models.config import ModelConfig


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, "GLU Variants Improve Transformer", equation 6: SwiGLU)."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        hidden_size, size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = GateUpLinear(hidden_size, size, bias, placement)
        self.down_proj = RowLinear(size, hidden_size, bias, placement)

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.gate_up_proj.weight_slots(prefix)
        yield from self.down_proj.weight_slots(f"{prefix}.down_proj")

    def forward(self, activations: Activations) -> None:
        """`activations.normed` -> `activations.hidden`."""
        self.gate_up_proj.gated(activations.normed, activations.gate_up, activations.mlp)
        self.down_proj(activations.mlp, activations.hidden)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, cos_sin: torch.Tensor, placement: Placement) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.self_attn = Attention(config, cos_sin, placement)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.mlp = MLP(config, placement)

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.input_layernorm.weight_slots(f"{prefix}.input_layernorm")
        yield from self.self_attn.weight_slots(f"{prefix}.self_attn")
        yield from self.post_attention_layernorm.weight_slots(f"{prefix}.post_attention_layernorm")
        yield from self.mlp.weight_slots(f"{prefix}.mlp")

    def forward(self, inputs: AttentionInputs, cache: LayerKVCache, activations: Activations, first: bool) -> None:
        """Add the `activations.hidden` of the layer before, if any, to the residual; leave this one's there."""
        if first:
            self.input_layernorm(activations.residual, None, activations.normed)
        else:
            self.input_layernorm(activations.hidden, activations.residual, activations.normed)
        self.self_attn(activations.normed, inputs, cache, activations)
        self.post_attention_layernorm(activations.hidden, activations.residual, activations.normed)
        self.mlp(activations)


class LlamaForCausalLM(CausalLM):
    """The decoder with its head."""

    def __init__(self, config: ModelConfig, max_model_len: int, placement: Placement) -> None:
        super().__init__(config)
        assert config.rope is not None
        cos_sin = rotary_table(config.rope, config.head_dim, max_model_len, placement.device)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, placement)
        self.layers = nn.ModuleList(DecoderLayer(config, cos_sin, placement) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, False, placement)

    def weight_slots(self) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.embed_tokens.weight_slots("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            yield from layer.weight_slots(f"model.layers.{i}")  # type: ignore[operator]
        yield from self.norm.weight_slots("model.norm")
        if not self.config.tie_word_embeddings:
            yield from self.lm_head.weight_slots("lm_head")

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor, buffers: ActivationBuffers) -> None:
        self.embed_tokens(token_ids, buffers.residual[: len(token_ids)])

    def forward(self, inputs: AttentionInputs, cache: Sequence[LayerKVCache], activations: Activations) -> None:
        for i, layer in enumerate(self.layers):
            layer(inputs, cache[i], activations, i == 0)

    def head(self, last: LastActivations) -> None:
        self.norm(last.hidden, last.residual, last.normed)
        self.lm_head(last.normed, last.logits)
