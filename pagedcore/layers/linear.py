"""Linear layers, split over the ranks of a tensor-parallel group (Megatron-LM, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from pagedcore import ops
from pagedcore.errors import ConfigError


class ParallelGroup(Protocol):
    """The ranks that share every layer. Collectives are called by all of them in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum `x` over the ranks, in place."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Put the ranks' [n, m] side by side: [n, size * m]."""
        ...


class SingleRank:
    """The group of a model that is whole on one device."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> None:
        """The sum over one rank is what it holds already."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


SINGLE_RANK = SingleRank()


class WeightSlot(NamedTuple):
    """Where a checkpoint's tensor goes: its slice from `start` along `dim` (this rank's share) fills `destination`.

    Without a destination the tensor belongs to the model, but this rank has no use for it.
    """

    destination: torch.Tensor | None
    full_shape: tuple[int, ...]
    dim: int = 0
    start: int = 0


@dataclass(frozen=True)
class Placement:
    """In which dtype, on which device and as whose share of the model a layer is built.

    `batch_invariant`: on a GPU, a token's results are to be the same bits whatever else a step computes. On a CPU they are.
    """

    dtype: torch.dtype
    device: torch.device
    group: ParallelGroup = SINGLE_RANK
    batch_invariant: bool = False

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialized weight; the loader fills it."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def buffer(self, rows: int, size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialized memory [rows, size] that layers read their inputs from and leave their results in."""
        room = ops.invariant_rows(rows) if self.batch_invariant else rows
        return torch.empty(room, size, dtype=dtype or self.dtype, device=self.device)[:rows]

    def share(self, size: int, name: str) -> int:
        """This rank's share of `size` heads or features."""
        if size % self.group.size:
            raise ConfigError(f"{name} must be a multiple of tensor_parallel_size {self.group.size}, got {size}")
        return size // self.group.size


class Linear(nn.Module):
    """y = x W^T (+ b), whole on every rank; the classes derived from it hold this rank's share of W.

    Owns the weight: row-major while loading, then laid out for the processor.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, placement: Placement) -> None:
        super().__init__()
        self.group = placement.group
        self.batch_invariant = placement.batch_invariant
        self.weight: nn.Parameter | None = placement.empty(out_features, in_features)
        self.bias = placement.empty(out_features) if bias else None
        self.packed: ops.PackedWeight | None = None

    def pack(self, arena: ops.WeightArena) -> None:
        """Lay the loaded weight out for the CPU kernels and free the row-major one."""
        assert self.weight is not None
        self.packed = ops.pack_linear(self.weight, arena)
        self.weight = None

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, in_features] -> out: [num_tokens, out_features], of x's dtype or float32.

        Both are the first rows of a `Placement.buffer`.
        """
        if self.packed is not None:
            return ops.packed_linear(x, self.packed, self.bias, out.dtype, out)
        assert self.weight is not None
        linear = ops.invariant_linear if self.batch_invariant else ops.linear
        return linear(x, self.weight, self.bias, out)

    def weight_slots(self, name: str) -> Iterator[tuple[str, WeightSlot]]:
        """The checkpoint's tensor names and where each goes."""
        assert self.weight is not None
        return self._slots(name, slice(None), self.weight.shape[0], 0)

    def _slots(self, name: str, rows: slice, full_rows: int, start: int) -> Iterator[tuple[str, WeightSlot]]:
        """Slots of weight and bias of one checkpoint layer that fills `rows` of this one."""
        assert self.weight is not None
        yield f"{name}.weight", WeightSlot(self.weight[rows], (full_rows, self.weight.shape[1]), 0, start)
        if self.bias is not None:
            yield f"{name}.bias", WeightSlot(self.bias[rows], (full_rows,), 0, start)


class ColumnLinear(Linear):
    """Split by output features: every rank computes its own columns of y."""

    def __init__(self, in_features: int, out_features: int, bias: bool, placement: Placement) -> None:
        self.full_out_features = out_features
        super().__init__(in_features, placement.share(out_features, "out_features"), bias, placement)

    def weight_slots(self, name: str) -> Iterator[tuple[str, WeightSlot]]:
        size = self.full_out_features // self.group.size
        return self._slots(name, slice(None), self.full_out_features, self.group.rank * size)


class QKVLinear(Linear):
    """The projections to queries, keys and values in one: rows q, k, v. Split by heads."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        placement: Placement,
    ) -> None:
        self.full_sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        self.num_heads = placement.share(num_heads, "num_attention_heads")
        self.num_kv_heads = placement.share(num_kv_heads, "num_key_value_heads")
        rows = (self.num_heads + 2 * self.num_kv_heads) * head_dim
        super().__init__(hidden_size, rows, bias, placement)

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        begin = 0
        for name, full in zip(("q_proj", "k_proj", "v_proj"), self.full_sizes, strict=True):
            size = full // self.group.size
            yield from self._slots(f"{prefix}.{name}", slice(begin, begin + size), full, self.group.rank * size)
            begin += size


class GateUpLinear(Linear):
    """The gate and up projections of the MLP in one: rows gate, up. Split by output features."""

    def __init__(self, hidden_size: int, size: int, bias: bool, placement: Placement) -> None:
        self.full_size = size
        super().__init__(hidden_size, 2 * placement.share(size, "intermediate_size"), bias, placement)

    def weight_slots(self, prefix: str) -> Iterator[tuple[str, WeightSlot]]:
        size = self.full_size // self.group.size
        for i, name in enumerate(("gate_proj", "up_proj")):
            rows = slice(i * size, (i + 1) * size)
            yield from self._slots(f"{prefix}.{name}", rows, self.full_size, self.group.rank * size)

    def gated(self, x: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """out = silu(gate) * up.

        x: [num_tokens, hidden_size]. gate_up: [num_tokens, 2 * size], room to work in. out: [num_tokens, size].
        """
        may_fuse = x.is_cuda and self.bias is None and not self.batch_invariant
        if may_fuse and self.weight is not None and ops.gated_linear(x, self.weight, out):
            return
        self(x, gate_up)
        ops.silu_and_mul(gate_up, out)


class RowLinear(Linear):
    """Split by input features: the ranks' partial sums are added. Rank 0 adds the bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool, placement: Placement) -> None:
        self.full_in_features = in_features
        self.has_bias = bias
        size = placement.share(in_features, "in_features")
        super().__init__(size, out_features, bias, placement)
        if placement.group.rank > 0:
            self.bias = None

    def weight_slots(self, name: str) -> Iterator[tuple[str, WeightSlot]]:
        assert self.weight is not None
        out_features, size = self.weight.shape
        full_shape = (out_features, self.full_in_features)
        yield f"{name}.weight", WeightSlot(self.weight, full_shape, 1, self.group.rank * size)
        if self.has_bias:
            yield f"{name}.bias", WeightSlot(self.bias, (out_features,))

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        super().forward(x, out)
        self.group.all_reduce(out)
        return out


class LMHead(ColumnLinear):
    """The projection to the vocabulary's logits, float32, whole on every rank."""

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, hidden_size] -> out: [num_rows, vocab_size] float32."""
        if self.group.size == 1:
            return super().forward(x, out)
        share = out.new_empty(len(out), out.shape[1] // self.group.size)
        return out.copy_(self.group.all_gather(super().forward(x, share)))
