"""The buffers of a forward pass: their shapes, and the room that fixed groups of rows need behind them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pagedcore import ops
from pagedcore.layers.activations import ActivationBuffers, Activations, LastActivations
from pagedcore.layers.linear import Placement
from pagedcore.models.config import ModelConfig
from tests.models import tiny


def rows_of(activations: Activations | LastActivations) -> list[torch.Tensor]:
    """Those that are matrices: what linear layers read and write."""
    tensors = [getattr(activations, field.name) for field in dataclasses.fields(activations)]
    return [tensor for tensor in tensors if tensor.dim() == 2]


@pytest.mark.parametrize("variant", ["llama", "opt-350m"])
def test_there_is_room_for_groups_of_rows_behind_every_buffer(variant: str, tmp_path: Path) -> None:
    tiny.make(variant, tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    placement = Placement(torch.bfloat16, torch.device("cpu"), batch_invariant=True)
    buffers = ActivationBuffers(config, 300, 9, placement)
    assert (len(buffers.residual), len(buffers.embedded), len(buffers.logits)) == (300, 300, 9)
    views = [
        *((count, tensor) for count in (1, 256, 257, 300) for tensor in rows_of(buffers.for_tokens(count))),
        *((9, tensor) for tensor in rows_of(buffers.for_rows(9)) + rows_of(buffers.for_decode(9))),
        (300, buffers.embedded),
    ]
    assert len(views) == 4 * 7 + 2 * 5 + 1
    for count, tensor in views:
        assert len(tensor) == count and tensor.is_contiguous()
        room = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
        assert room >= -(-count // ops.INVARIANT_ROWS) * ops.INVARIANT_ROWS * tensor.shape[1]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for _, tensor in views}
    assert buffers.num_bytes == sum(held.values()), "the room counts"


def test_without_the_mode_there_is_none(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    buffers = ActivationBuffers(config, 300, 9, Placement(torch.bfloat16, torch.device("cpu")))
    assert buffers.logits.untyped_storage().nbytes() == 9 * config.vocab_size * 4
    assert buffers.residual.untyped_storage().nbytes() == 300 * config.hidden_size * 2
