"""Runs the model on one step's batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pagedcore.execution.batch import BatchInputs
from pagedcore.execution.cpu_graphs import CpuGraphs
from pagedcore.execution.kv_cache import KVCache
from pagedcore.layers.activations import ActivationBuffers
from pagedcore.models.causal_lm import CausalLM


class ModelRunner:
    """Turns a batch into logits. Keeps nothing from one step to the next but the KV cache and graphs of recurring steps."""

    def __init__(
        self, model: CausalLM, kv_cache: KVCache, buffers: ActivationBuffers, enforce_eager: bool = False
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._buffers = buffers
        self._graphs = CpuGraphs(enabled=not enforce_eager)

    def run(self, batch: BatchInputs, on_start: Callable[[], None] = lambda: None) -> torch.Tensor:
        """Compute the batch's tokens; returns the logits of each row's last one, [num_rows, vocab_size] float32.

        The result lies in a buffer that the next call overwrites. `on_start` is called when all is prepared, just before
        the GIL is released for most of the step.
        """
        num_tokens = batch.header.num_tokens
        self._kv_cache.prepare(batch.buffer, batch.header)
        self._model.embed(batch.token_ids, batch.positions, self._buffers)
        on_start()
        self._graphs.run(
            ("layers", num_tokens) if batch.is_decode else None,
            lambda: self._model(batch.attention(), self._kv_cache.layers, self._buffers.for_tokens(num_tokens)),
        )
        return self.logits_at(batch.last_positions)

    def logits_at(self, indices: torch.Tensor) -> torch.Tensor:
        """The logits of these of the tokens that `run` computed last, [num, vocab_size] float32, where its result was.

        indices: [num] int32, at most as many as a step may have rows.
        """
        num = len(indices)
        self._buffers.gather_last(indices)
        self._graphs.run(("head", num), lambda: self._model.head(self._buffers.for_rows(num)))
        return self._buffers.logits[:num]
