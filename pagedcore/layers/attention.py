"""Multi-head attention over the paged KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from pagedcore import ops
from pagedcore.layers.activations import Activations
from pagedcore.layers.linear import Placement, QKVLinear, RowLinear, WeightSlot
from pagedcore.layers.norm import RMSNorm
from pagedcore.models.config import ModelConfig


class LayerKVCache(NamedTuple):
    """One layer's keys and values, each [num_blocks, num_kv_heads, block_size, head_dim]."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Which tokens a step computes and where their context lies (int32, on the model's device).

    Row r has the tokens [query_start_loc[r], query_start_loc[r + 1]), the last ones of its seq_lens[r].
    """

    positions: torch.Tensor  # [num_tokens]
    slot_mapping: torch.Tensor  # [num_tokens]; -1: padding
    query_start_loc: torch.Tensor  # [num_rows + 1]
    seq_lens: torch.Tensor  # [num_rows]
    block_tables: torch.Tensor  # [num_rows, table_width]
    max_query_len: int
    workspace: torch.Tensor | None = None  # a GPU's, see ops.paged_attention


class Attention(nn.Module):
    """Projections, rotary embedding, cache write and attention of one layer.

    `cos_sin`: the rotary table, None in a model whose positions are embedded with its tokens.
    """

    def __init__(self, config: ModelConfig, cos_sin: torch.Tensor | None, placement: Placement) -> None:
        super().__init__()
        head_dim = config.head_dim
        self.qkv_proj = QKVLinear(
            config.hidden_size, config.num_heads, config.num_kv_heads, head_dim, config.qkv_bias, placement
        )
        self.o_proj = RowLinear(config.num_heads * head_dim, config.hidden_size, config.output_bias, placement)
        self.num_heads = self.qkv_proj.num_heads
        self.num_kv_heads = self.qkv_proj.num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.batch_invariant = placement.batch_invariant
        self.cos_sin = cos_sin
        self.norm_eps = config.norm_eps
        self.q_norm = RMSNorm(head_dim, config.norm_eps, placement) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.norm_eps, placement) if config.qk_norm else None

    def weight_slots(self, prefix: str, output_name: str = "o_proj") -> Iterator[tuple[str, WeightSlot]]:
        """`output_name`: what the checkpoint calls the output projection."""
        yield from self.qkv_proj.weight_slots(prefix)
        yield from self.o_proj.weight_slots(f"{prefix}.{output_name}")
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.weight_slots(f"{prefix}.q_norm")
            yield from self.k_norm.weight_slots(f"{prefix}.k_norm")

    def forward(self, x: torch.Tensor, inputs: AttentionInputs, cache: LayerKVCache, activations: Activations) -> None:
        """x: [num_tokens, hidden_size] -> `activations.hidden`; writes the step's keys and values."""
        self.qkv_proj(x, activations.qkv)
        ops.rotary_write_kv(
            activations.qkv,
            self.cos_sin,
            inputs.positions,
            inputs.slot_mapping,
            cache.k,
            cache.v,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.norm_eps,
        )
        ops.paged_attention(
            activations.context,
            activations.queries,
            cache.k,
            cache.v,
            inputs.block_tables,
            inputs.query_start_loc,
            inputs.seq_lens,
            inputs.max_query_len,
            self.scale,
            inputs.workspace,
            self.batch_invariant,
        )
        self.o_proj(activations.context_rows, activations.hidden)
