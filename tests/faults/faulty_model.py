"""The real model with faults that prompts ask for, as `triggers` lists them; only a tritonserver can import it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from pagedcore_triton.model import TritonPythonModel as Model
from pagedcore_triton.sequence_output import SequenceOutput

from pagedcore.engine import memory_policy
from pagedcore.execution.batch import block_swaps
from tests.faults import triggers
from tests.reference.single_growth import SingleGrowth


class RefusingBlocks(SingleGrowth):
    """Finds no room at every k-th request for blocks."""

    every = 0
    num_requests = 0

    def grow(self, seq_id: int, num_tokens: int, write_from: int) -> bool:
        return not self._refuses() and super().grow(seq_id, num_tokens, write_from)

    def swap_out(self, seq_ids: list[int]) -> list[tuple[int, int]] | None:
        return None if self._refuses() else super().swap_out(seq_ids)

    def swap_in(self, seq_ids: list[int]) -> list[tuple[int, int]] | None:
        return None if self._refuses() else super().swap_in(seq_ids)

    @classmethod
    def _refuses(cls) -> bool:
        cls.num_requests += 1
        return cls.every > 0 and cls.num_requests % cls.every == 0


class FailsOnce:
    """A counter whose first increment fails."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._has_failed = False

    def increment(self, value: float) -> None:
        if not self._has_failed:
            self._has_failed = True
            raise RuntimeError("the metric is broken")
        self._metric.increment(value)


class TritonPythonModel(Model):
    """Fails where it is asked to."""

    def initialize(self, args: dict[str, str]) -> None:
        module: Any = memory_policy
        module.BlockManager = RefusingBlocks
        super().initialize(args)
        executor: Any = self._engine._engine._executor
        executor._runner.run = _failing_run(executor._runner.run)
        executor._sampler = _failing_sampler(executor._sampler)
        self._kv_cache = executor._runner._kv_cache
        self._prepare = self._kv_cache.prepare
        self._encode = self._tokenizer.encode
        tokenizer: Any = self._tokenizer
        tokenizer.encode = self._failing_encode

    def _failing_encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if text.startswith(triggers.TOKENIZER_RAISES):
            raise RuntimeError("the tokenizer is broken")
        if text.startswith(triggers.NO_MEMORY):
            raise MemoryError
        if text.startswith(triggers.REFUSE):
            RefusingBlocks.every = int(text.removeprefix(triggers.REFUSE))
        if text.startswith(triggers.SWAP_RAISES):
            self._kv_cache.prepare = self._half_a_swap
        if text.startswith(triggers.SUBMIT_RAISES):
            engine: Any = self._engine
            engine.submit = self._failing_submit
        if text.startswith(triggers.METRICS_RAISE):
            assert self._metrics is not None
            for line in self._metrics._counters:
                line._metric = FailsOnce(line._metric)
        if text.startswith(triggers.CLOCK_JUMPS):
            clock: Any = time
            clock.time = lambda: 0.0
        return self._encode(text, add_special_tokens)

    def _failing_submit(self, *_: Any) -> None:
        """Once."""
        vars(self._engine).pop("submit")
        raise RuntimeError("the way to the engine is broken")

    def _sequence_outputs(self, generate: Any, prompt_token_ids: list[int]) -> list[SequenceOutput]:
        outputs = super()._sequence_outputs(generate, prompt_token_ids)
        if self._tokenizer.decode(prompt_token_ids).startswith(triggers.DETOKENIZER_RAISES):
            for output in outputs:
                broken: Any = output._text
                broken.push = _raise
        return outputs

    def _half_a_swap(self, buffer: torch.Tensor, header: Any) -> None:
        """Once: the first half of what comes in has come, then it fails."""
        if header.num_swap_ins == 0:
            self._prepare(buffer, header)
            return
        self._kv_cache.prepare = self._prepare
        outs, ins = block_swaps(buffer, header)
        for pairs, source, destination in (
            (outs, self._kv_cache.tensor, self._kv_cache.host),
            (ins[: len(ins) // 2], self._kv_cache.host, self._kv_cache.tensor),
        ):
            destination[:, :, pairs[:, 1].long()] = source[:, :, pairs[:, 0].long()]
        raise RuntimeError("a swap has failed half way")


def _failing_run(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def failing(batch: Any, on_start: Callable[[], None]) -> torch.Tensor:
        ids = batch.token_ids.tolist()
        if triggers.STEP_RAISES in ids:
            raise RuntimeError("the step is broken")
        if triggers.SLOW_STEP in ids:
            time.sleep(triggers.SLOW_SECONDS)
        logits = run(batch, on_start=on_start)
        logits[batch.token_ids.index_select(0, batch.last_positions) == triggers.NAN_LOGITS] = torch.nan
        return logits

    return failing


def _failing_sampler(sampler: Callable[..., Any]) -> Callable[..., Any]:
    def failing(logits: torch.Tensor, buffer: torch.Tensor, header: Any, input_ids: torch.Tensor) -> Any:
        if triggers.SAMPLER_RAISES in input_ids.tolist():
            raise RuntimeError("the sampler is broken")
        return sampler(logits, buffer, header, input_ids)

    return failing


def _raise(*_: Any, **__: Any) -> str:
    raise RuntimeError("the detokenizer is broken")
