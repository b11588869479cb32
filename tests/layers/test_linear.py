"""A linear layer gives from the weight laid out for the CPU kernels what torch gives from the row-major one."""

from __future__ import annotations

import pytest
import torch

from pagedcore import ops
from pagedcore.layers.linear import ColumnLinear, GateUpLinear, Linear, LMHead, Placement, QKVLinear, RowLinear

IN, OUT = 48, 80
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layers(placement: Placement) -> list[Linear]:
    return [
        ColumnLinear(IN, OUT, True, placement),
        RowLinear(IN, OUT, True, placement),
        RowLinear(IN, OUT, False, placement),
        QKVLinear(IN, 3, 1, 16, True, placement),
        GateUpLinear(IN, OUT // 2, False, placement),
        LMHead(IN, OUT, False, placement),
    ]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.inference_mode()
def test_packed_and_row_major_weights_agree(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for layer in layers(Placement(dtype, torch.device("cpu"))):
        assert layer.weight is not None
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        x = torch.randn(5, IN).to(dtype) / IN**0.5
        out_dtype = torch.float32 if isinstance(layer, LMHead) else dtype
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias).to(out_dtype)
        output = torch.full((5, OUT), torch.nan, dtype=out_dtype)
        layer.pack(ops.WeightArena())
        assert layer.weight is None
        layer(x, output)
        torch.testing.assert_close(output, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
