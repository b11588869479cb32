"""The executor that runs steps on this machine's processor, on a thread of its own."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from pathlib import Path

import numpy as np
import torch

from pagedcore import ops
from pagedcore.config import EngineConfig
from pagedcore.engine.executor import KVCacheShape
from pagedcore.engine.sampling_extras import max_extras
from pagedcore.engine.step_plan import Header, Int32Array, StepLayout, StepPlan, StepResult
from pagedcore.engine.step_sizes import NO_PADDING
from pagedcore.errors import ConfigError
from pagedcore.execution.batch import InputBuffers
from pagedcore.execution.kv_cache import (
    KVCache,
    block_bytes,
    check_activations,
    free_host_memory,
    plan_memory,
    plan_swap_space,
    swap_cost_tokens,
)
from pagedcore.execution.model_runner import ModelRunner
from pagedcore.execution.prompt_scorer import prompt_logprobs
from pagedcore.execution.sampler import Sampler
from pagedcore.layers.activations import ActivationBuffers
from pagedcore.layers.linear import Placement
from pagedcore.models.config import ModelConfig
from pagedcore.models.loader import check_weights, load_model

# Operations that a processor computes of a prompt in the time in which it copies a byte: about 0.8e12 / 8e9 a second.
OPERATIONS_PER_SWAPPED_BYTE = 100
WARM_UP_TOKENS = 256
NUM_STEP_BUFFERS = 3  # one read by the running step, one launched behind it, one being filled

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_logger = logging.getLogger(__name__)


def cpu_dtype(asked: str, checkpoint: str) -> torch.dtype:
    """The dtype of weights, activations and KV cache on a CPU.

    "auto" takes the checkpoint's, and bfloat16 for a float16 checkpoint: processors compute in it natively or convert
    it with a shift, and float16 in neither way. Raises ConfigError where float16 is asked for.
    """
    if asked == "auto":
        asked = "bfloat16" if checkpoint == "float16" else checkpoint
    if asked not in _DTYPES:
        raise ConfigError(f"dtype must be one of auto, {', '.join(_DTYPES)} on a CPU, got {asked!r}")
    return _DTYPES[asked]


class LocalPendingStep:
    """A step that waits for the worker thread or has been run by it."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.outcome: StepResult | BaseException | None = None
        # Held until the outcome is delivered. A bare lock: a Future's bookkeeping would delay the next step's kernels.
        self._pending = threading.Lock()
        self._pending.acquire()

    def deliver(self) -> None:
        """Let `wait` return the outcome."""
        self._pending.release()

    def wait(self) -> StepResult:
        """Block until the step is done; raises what the step raised."""
        with self._pending:
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            assert self.outcome is not None
            return self.outcome


class LocalExecutor:
    """Owns model, KV cache, activations and sampler, and the thread that runs the steps in the order of their launches.

    A step that raises leaves the executor as it was: the error comes out of its `wait`, and the next step runs.
    `memory` says where the memory went.
    """

    step_sizes = NO_PADDING  # a CPU step needs no padding

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        folder: Path,
        max_model_len: int,
        max_num_batched_tokens: int,
    ) -> None:
        """Load the model from `folder` and allocate all memory. Raises ConfigError for what cannot be loaded or fit."""
        placement = Placement(cpu_dtype(config.dtype, model_config.dtype), torch.device("cpu"))
        if config.num_threads is not None:
            ops.set_num_threads(config.num_threads)
        max_rows, block_size = config.max_num_seqs, config.block_size
        table_width = -(-max_model_len // block_size)
        with torch.inference_mode():
            free_bytes = free_host_memory()
            check_weights(model_config, max_model_len, placement, free_bytes)
            model = load_model(folder, model_config, max_model_len, placement, config.load_format, config.seed)
            check_activations(model_config, max_num_batched_tokens, max_rows, placement, free_bytes - model.num_bytes)
            activations = ActivationBuffers(model_config, max_num_batched_tokens, max_rows, placement)
            self._inputs = InputBuffers(max_num_batched_tokens, max_rows, table_width, placement.device)
            block = block_bytes(model_config, block_size, placement)
            num_host_blocks = plan_swap_space(config, block, free_bytes)
            buffer_size = step_buffer_size(
                max_rows, max_num_batched_tokens, table_width, max_model_len, num_host_blocks
            )
            self._step_buffers = [np.zeros(buffer_size, dtype=np.int32) for _ in range(NUM_STEP_BUFFERS)]
            self.memory = plan_memory(
                config,
                weights=model.num_bytes,
                activations=activations.num_bytes,
                inputs=self._inputs.num_bytes + sum(buffer.nbytes for buffer in self._step_buffers),
                swap_space=num_host_blocks * block,
                block=block,
                max_model_len=max_model_len,
                free_bytes=free_bytes,
            )
            num_blocks = self.memory.num_blocks
            kv_cache = KVCache(model_config, num_blocks, block_size, placement, num_host_blocks)
        _logger.info("%s", self.memory)
        num_weights = model.num_bytes / placement.dtype.itemsize
        swap_cost = swap_cost_tokens(block, num_weights, OPERATIONS_PER_SWAPPED_BYTE)
        self.kv_cache_shape = KVCacheShape(num_blocks, num_host_blocks, block_size, swap_cost)
        self._runner = ModelRunner(model, kv_cache, activations, config.enforce_eager)
        self._sampler = Sampler()
        self._last_token_ids = torch.zeros(max_rows, dtype=torch.int32, device=placement.device)
        self._undelivered: LocalPendingStep | None = None  # the worker thread's own
        self._inbox: queue.SimpleQueue[LocalPendingStep | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._run_steps, name="pagedcore-executor", daemon=True)
        self._worker.start()
        for num_tokens in (min(WARM_UP_TOKENS, max_model_len, max_num_batched_tokens, num_blocks * block_size), 1):
            self._warm_up(num_tokens)

    def _warm_up(self, num_tokens: int) -> None:
        """Run a step of one sequence that writes to the first slots of the cache, which no block table refers to yet.

        The system gives the cache its memory where it is first written to, layer by layer; a request would wait for that.
        """
        layout = StepLayout(num_tokens, 1, 1)
        header = Header(num_tokens, 1, 1, num_tokens, 1, num_tokens, num_tokens, 0, 0, 0, any_random=0, max_logprobs=-1)
        packed = torch.zeros(layout.copies, dtype=torch.int32)
        packed[: len(header)] = torch.tensor(header)
        packed[layout.slot_mapping : layout.query_start_loc] = torch.arange(num_tokens, dtype=torch.int32)
        packed[layout.query_start_loc + 1] = packed[layout.seq_lens] = num_tokens
        step = LocalPendingStep(packed)
        self._inbox.put(step)
        step.wait()

    def step_buffers(self) -> list[Int32Array]:
        """Three buffers, each large enough for any step."""
        return self._step_buffers

    def launch(self, plan: StepPlan) -> LocalPendingStep:
        """Hand the step to the worker thread; returns at once."""
        step = LocalPendingStep(torch.from_numpy(plan.buffer[: plan.used]))
        self._inbox.put(step)
        return step

    def shutdown(self) -> None:
        """Finish what was launched and end the worker thread."""
        self._inbox.put(None)
        self._worker.join()

    def _run_steps(self) -> None:
        # What torch computes beside the kernels is small; OpenMP threads spinning for it would take the kernels' cores.
        torch.set_num_threads(1)
        while (step := self._next_step()) is not None:
            try:
                with torch.inference_mode():
                    step.outcome = self._run(step.buffer)
            except BaseException as error:
                step.outcome = error
            self._deliver()  # the step before, if this one failed before its kernels started
            self._undelivered = step
        self._deliver()

    def _next_step(self) -> LocalPendingStep | None:
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            self._deliver()
            return self._inbox.get()

    def _deliver(self) -> None:
        """Hand back the outcome of the last step.

        Where the next step waits already, this happens as late as when its kernels start: the thread that takes the
        outcome would compete for the GIL with the preparation of those, and now has it to itself while they run.
        """
        if self._undelivered is not None:
            self._undelivered.deliver()
            self._undelivered = None

    def _run(self, buffer: torch.Tensor) -> StepResult:
        batch = self._inputs.load(buffer, self._last_token_ids)
        logits = self._runner.run(batch, on_start=self._deliver)
        sampled = self._sampler(logits, batch.buffer, batch.header, batch.token_ids)
        self._last_token_ids[: len(sampled.token_ids)] = sampled.token_ids
        result = sampled.to_result()
        if batch.header.num_prompt_targets == 0:
            return result
        of_prompts = prompt_logprobs(self._runner.logits_at, batch.buffer, batch.header, len(self._last_token_ids))
        return dataclasses.replace(result, prompt_logprobs=of_prompts)


def step_buffer_size(
    max_rows: int, max_tokens: int, table_width: int, max_model_len: int, num_host_blocks: int = 0
) -> int:
    """int32 elements of the largest step."""
    copies = 2 * max_rows  # a step writes into one shared block of a row at most
    swaps = 2 * num_host_blocks  # all out and all in
    prompts = 2 * max_tokens  # each token of the step may tell of a prompt token
    return (
        StepLayout(max_tokens, max_rows, table_width).copies
        + 2 * (copies + swaps)
        + prompts
        + max_extras(max_rows, max_model_len)
    )
