"""Drives the model's paged path by hand: plans made here, blocks from the real block manager, no engine."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pagedcore._core import BlockManager
from pagedcore.engine.step_plan import HEADER_SIZE, NUM_SAMPLING_COLUMNS, Int32Array, SamplingColumn, StepLayout
from pagedcore.execution.batch import InputBuffers
from pagedcore.execution.kv_cache import KVCache
from pagedcore.execution.model_runner import ModelRunner
from pagedcore.layers.activations import ActivationBuffers
from pagedcore.layers.linear import SINGLE_RANK, ParallelGroup, Placement
from pagedcore.models.config import ModelConfig
from pagedcore.models.loader import load_model


@dataclass
class Row:
    """A sequence and how far it has been computed."""

    seq_id: int
    token_ids: array[int]
    num_computed: int = 0
    last_row: int = -1


def fill_buffer(blocks: BlockManager, rows: Sequence[Row], query_lens: Sequence[int]) -> Int32Array:
    """Grow the rows' block tables and pack a greedy step that computes the next query_lens[i] tokens of each."""
    ends = [row.num_computed + n for row, n in zip(rows, query_lens, strict=True)]
    for row, end in zip(rows, ends, strict=True):
        assert blocks.grow(row.seq_id, end, row.num_computed), "the test's pool is too small"
    width = blocks.blocks_needed(max(ends))
    layout = StepLayout(sum(query_lens), len(rows), width)
    buffer = np.zeros(layout.copies + 2 * len(rows) + HEADER_SIZE, dtype=np.int32)
    used = blocks.fill_step(
        buffer,
        num_rows=len(rows),
        num_tokens=sum(query_lens),
        table_width=width,
        seq_ids=[row.seq_id for row in rows],
        num_computed=[row.num_computed for row in rows],
        query_lens=list(query_lens),
        token_ids=[row.token_ids for row in rows],
        last_rows=[row.last_row for row in rows],
    )
    sampling = buffer[layout.sampling : layout.copies].reshape(-1, NUM_SAMPLING_COLUMNS)
    sampling[:, SamplingColumn.NUM_LOGPROBS] = -1
    buffer[11] = -1  # Header.max_logprobs
    for row, end in zip(rows, ends, strict=True):
        row.num_computed = end
    return buffer[:used]


class PagedModel:
    """A model with a small pool of its own; computes logits at the end of any chunk of any mix of sequences."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        block_size: int = 8,
        num_blocks: int = 256,
        group: ParallelGroup = SINGLE_RANK,
        enforce_eager: bool = False,
    ) -> None:
        config = ModelConfig.from_folder(folder)
        placement = Placement(dtype, torch.device("cpu"), group)
        with torch.inference_mode():
            model = load_model(folder, config, config.max_position_embeddings, placement, "safetensors", 0)
            cache = KVCache(config, num_blocks, block_size, placement)
            cache.tensor.fill_(float("nan"))  # a slot that is read before it was written shows
            # Collectives between threads are no kernel calls: a graph would leave them out.
            eager = enforce_eager or group.size > 1
            self._runner = ModelRunner(model, cache, ActivationBuffers(config, 4096, 256, placement), eager)
            table_width = -(-config.max_position_embeddings // block_size)
            self._inputs = InputBuffers(4096, 256, table_width, placement.device)
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=False)
        self._next_id = 0

    def add(self, token_ids: Sequence[int]) -> Row:
        """A new sequence of known tokens, none computed."""
        row = Row(self._next_id, array("i", token_ids))
        self.blocks.add(row.seq_id)
        self._next_id += 1
        return row

    def logits(self, rows: Sequence[Row], query_lens: Sequence[int]) -> torch.Tensor:
        """Compute the rows' next tokens: [len(rows), vocab_size] float32, at the last token of each chunk."""
        buffer = torch.from_numpy(fill_buffer(self.blocks, rows, query_lens))
        with torch.inference_mode():
            return self._runner.run(self._inputs.load(buffer, torch.zeros(1, dtype=torch.int32))).clone()
