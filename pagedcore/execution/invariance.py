"""Whether a GPU's linear layers keep what `batch_invariant` promises."""

from __future__ import annotations

import torch

from pagedcore import ops
from pagedcore.errors import ConfigError
from pagedcore.layers.linear import Linear, LMHead, Placement
from pagedcore.models.causal_lm import CausalLM


def check_linear_layers(model: CausalLM, placement: Placement) -> None:
    """Try every shape of layer with one row at all places of a product, which must make no difference.

    cuBLAS gets products of one size, but within them it is free to add up some rows in another order than others. Which
    algorithm it takes depends on the shape, the GPU and its own version. Raises ConfigError.
    """
    generator = torch.Generator(placement.device).manual_seed(0)
    tried = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear):
            continue
        assert layer.weight is not None
        out_features, in_features = layer.weight.shape
        out_dtype = torch.float32 if isinstance(layer, LMHead) else placement.dtype
        shape = (in_features, out_features, layer.bias is not None, out_dtype)
        if shape in tried:
            continue
        tried.add(shape)
        row = torch.randn(in_features, generator=generator, device=placement.device).to(placement.dtype)
        x = placement.buffer(ops.INVARIANT_ROWS, in_features)
        out = placement.buffer(ops.INVARIANT_ROWS, out_features, out_dtype)
        ops.invariant_linear(x.copy_(row), layer.weight, layer.bias, out)
        if not bits_are_alike(out):
            raise ConfigError(
                f"batch_invariant must be false here: the GPU's library computes the rows of a product with {name} "
                f"[{out_features}, {in_features}] in different ways"
            )
        del row, x, out
    torch.cuda.empty_cache()  # what was tried is in nobody's plan


def bits_are_alike(rows: torch.Tensor) -> bool:
    """Whether all rows are the same bits. rows: contiguous, of 16 or 32 bits an element."""
    bits = rows.view(torch.int16 if rows.itemsize == 2 else torch.int32)
    return bool((bits == bits[0]).all())
