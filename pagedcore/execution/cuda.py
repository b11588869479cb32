"""The executor that runs steps on one NVIDIA GPU."""

from __future__ import annotations

import dataclasses
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pagedcore import _kernels, ops
from pagedcore.config import EngineConfig
from pagedcore.engine.executor import KVCacheShape
from pagedcore.engine.step_plan import Header, Int32Array, StepLayout, StepPlan, StepResult
from pagedcore.engine.step_sizes import NO_PADDING, StepSizes
from pagedcore.errors import ConfigError, EngineDeadError, public_text
from pagedcore.execution.cuda_step import CapturedStep, CudaInputs, CudaStep
from pagedcore.execution.invariance import check_linear_layers
from pagedcore.execution.kv_cache import (
    KVCache,
    MemoryPlan,
    block_bytes,
    check_activations,
    free_host_memory,
    plan_gpu_memory,
    plan_swap_space,
    swap_cost_tokens,
)
from pagedcore.execution.local import NUM_STEP_BUFFERS, step_buffer_size
from pagedcore.execution.prompt_scorer import prompt_logprobs
from pagedcore.execution.sampler import SampledTokens, Sampler
from pagedcore.execution.warm_up import allocate_for_draws
from pagedcore.layers.activations import ActivationBuffers
from pagedcore.layers.linear import Placement
from pagedcore.models.config import ModelConfig
from pagedcore.models.loader import check_weights, load_model

HEAD_DIMS = (64, 80, 96, 128, 256)
MIN_BLOCK_SIZE = 16
DEFAULT_SWAP_SPACE = 4.0  # GiB
# Operations that a GPU computes of a prompt in the time in which it moves a byte over PCIe: about 6e14 / 2.5e10 a second.
OPERATIONS_PER_SWAPPED_BYTE = 24_000
# Operations that take a GPU about as long as Python takes to launch a step's kernels in a server, where other threads take the
# interpreter lock between two launches: about 50 ms with 32 layers and 256 streams.
LAUNCH_BOUND_OPERATIONS = 3.3e13

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_logger = logging.getLogger(__name__)


def has_cuda_device() -> bool:
    """Whether there is a GPU and the kernels were built for one."""
    return _kernels.has_cuda and torch.cuda.is_available()


def cuda_dtype(asked: str, checkpoint: str) -> torch.dtype:
    """The dtype of weights, activations and KV cache on a GPU.

    "auto" takes the checkpoint's, and bfloat16 for a float32 one. Raises ConfigError where float32 is asked for.
    """
    if asked == "auto":
        asked = "bfloat16" if checkpoint == "float32" else checkpoint
    if asked not in _DTYPES:
        raise ConfigError(f"dtype must be one of auto, {', '.join(_DTYPES)} on a GPU, got {asked!r}")
    return _DTYPES[asked]


def captured_sizes(max_num_seqs: int, max_num_batched_tokens: int, num_weights: float) -> StepSizes:
    """The sizes for which steps of a model are captured.

    Of decode steps: dense where a step is short, up to max_num_seqs. Of others: as long as launching their kernels one by
    one takes longer than their work.
    """

    def up_to(limit: int, sizes: list[int]) -> tuple[int, ...]:
        return (*(size for size in sizes if size < limit), limit)

    decode_rows = up_to(max_num_seqs, [1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs, 16)])
    prefill_tokens = [*range(64, 512, 64), *range(512, 1024, 128), *range(1024, 2049, 256)]
    most = min(max_num_batched_tokens, LAUNCH_BOUND_OPERATIONS / (2 * num_weights))
    return StepSizes(
        decode_rows,
        tuple(size for size in prefill_tokens if size <= most),
        up_to(max_num_seqs, [16, 64]),
    )


class CudaPendingStep:
    """A step enqueued on the GPU. Its tokens are on the way to pinned memory."""

    def __init__(self, done: torch.cuda.Event, result: StepResult) -> None:
        self._done = done
        self._result = result

    def wait(self) -> StepResult:
        """Block until the step is done; EngineDeadError where the GPU has failed, for it can do nothing after that."""
        try:
            self._done.synchronize()
        except torch.AcceleratorError as error:
            raise EngineDeadError(f"the GPU failed: {public_text(error)}") from error
        return self._result


class FailedStep:
    """A step that could not be launched."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def wait(self) -> StepResult:
        """Raise what went wrong."""
        raise self._error


class CudaExecutor:
    """Owns model, KV cache, activations and graphs on one GPU, and the stream on which the steps run in their order.

    Launching only enqueues: one copy in, the kernels (a single graph where all rows decode), one copy out.
    `memory` says where the memory went.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        folder: Path,
        max_model_len: int,
        max_num_batched_tokens: int,
    ) -> None:
        """Load the model from `folder`, allocate all memory and capture the graphs. Raises ConfigError."""
        _check_kernels_serve(model_config, config.block_size)
        self._device = torch.device("cuda", config.device_index)
        dtype = cuda_dtype(config.dtype, model_config.dtype)
        placement = Placement(dtype, self._device, batch_invariant=config.batch_invariant)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._thread = 0  # the one that launches
        # In a thread that ends with it: torch hands its cuBLAS handle on to the next one that needs one, which is the one that
        # launches steps, and with the handle a workspace that the memory plan has counted.
        with ThreadPoolExecutor(1, "pagedcore-load") as loader:
            sizes = (max_model_len, max_num_batched_tokens)
            loader.submit(self._load_on_stream, config, model_config, folder, placement, *sizes).result()
        _logger.info("%s", self.memory)

    def _load_on_stream(self, config: EngineConfig, *arguments: Any) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                self._load(config, *arguments)
                self._stream.synchronize()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"max_num_batched_tokens = {arguments[-1]}, max_num_seqs = {config.max_num_seqs} and max_logprobs = "
                f"{config.max_logprobs} are too much for the GPU beside the model: {public_text(error)}"
            ) from error

    def _load(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        folder: Path,
        placement: Placement,
        max_model_len: int,
        max_tokens: int,
    ) -> None:
        max_rows, block_size = config.max_num_seqs, config.block_size
        table_width = -(-max_model_len // block_size)
        check_weights(model_config, max_model_len, placement, torch.cuda.mem_get_info(self._device)[0])
        model = load_model(folder, model_config, max_model_len, placement, config.load_format, config.seed)
        if config.batch_invariant:
            check_linear_layers(model, placement)
        num_weights = model.num_bytes / placement.dtype.itemsize
        sizes = NO_PADDING if config.enforce_eager else captured_sizes(max_rows, max_tokens, num_weights)
        self.step_sizes = sizes
        check_activations(model_config, max_tokens, max_rows, placement, torch.cuda.mem_get_info(self._device)[0])
        activations = ActivationBuffers(model_config, max_tokens, max_rows, placement)
        block = block_bytes(model_config, block_size, placement)
        num_host_blocks = plan_swap_space(config, block, free_host_memory(), DEFAULT_SWAP_SPACE)
        size = step_buffer_size(max_rows, max_tokens, table_width, max_model_len, num_host_blocks)
        inputs = CudaInputs(size, max_tokens, max_rows, table_width, self._device)
        workspace_bytes = ops.paged_attention_workspace_bytes(
            self._device, model_config.num_heads, model_config.num_kv_heads, model_config.head_dim
        )
        workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=self._device)
        self._host_buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(NUM_STEP_BUFFERS)]
        self._drawn = [torch.zeros(max_rows, dtype=torch.int32, pin_memory=True) for _ in range(NUM_STEP_BUFFERS)]
        self._drawn_arrays = [drawn.numpy() for drawn in self._drawn]
        self._events = [torch.cuda.Event() for _ in range(NUM_STEP_BUFFERS)]  # type: ignore[no-untyped-call]
        for event in self._events:
            event.record()  # what makes it
        self._sampler = Sampler()

        # The largest step, on a cache of one block: what libraries allocate on first use is then allocated.
        self._step = CudaStep(model, KVCache(model_config, 1, block_size, placement), activations, inputs, workspace)
        query_len = min(max_tokens, max_model_len)
        self._run_padding(min(max(max_tokens // max_model_len, 1), max_rows), query_len, query_len)
        self._run_padding(max_rows, 1, 1)
        reserved = torch.cuda.memory_reserved(self._device)
        allocate_for_draws(activations.logits, max_tokens, max_model_len, config.max_logprobs)
        draws = torch.cuda.memory_reserved(self._device) - reserved
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        plan = plan_gpu_memory(
            config,
            weights=model.num_bytes,
            activations=activations.num_bytes,
            inputs=inputs.num_bytes,
            workspace=workspace_bytes,
            draws=draws,
            swap_space=num_host_blocks * block,
            block=block,
            max_model_len=max_model_len,
            used_bytes=total_bytes - free_bytes,
            total_bytes=total_bytes,
        )
        kv_cache = KVCache(model_config, plan.num_blocks, block_size, placement, num_host_blocks)
        swap_cost = swap_cost_tokens(block, num_weights, OPERATIONS_PER_SWAPPED_BYTE)
        self.kv_cache_shape = KVCacheShape(plan.num_blocks, num_host_blocks, block_size, swap_cost)
        self._step = CudaStep(model, kv_cache, activations, inputs, workspace)
        self._enqueuer = ops.StepEnqueuer(
            inputs.packed, self._host_buffers, inputs.last_token_ids, self._drawn, self._stream.cuda_stream
        )
        self.memory: MemoryPlan = plan.with_graphs(self._capture_steps())

    def _capture_steps(self) -> int:
        """Capture steps of all sizes; returns the bytes that the graphs take."""
        before, _ = torch.cuda.mem_get_info(self._device)
        pool = torch.cuda.graph_pool_handle()
        for num_tokens in reversed(self.step_sizes.prefill_tokens):
            self._run_padding(1, num_tokens, 0)
            for num_rows in self.step_sizes.prefill_rows:
                self._step.capture(num_tokens, num_rows, False, pool)
        for num_rows in reversed(self.step_sizes.decode_rows):
            self._run_padding(num_rows, 1, 1)
            self._step.capture(num_rows, num_rows, True, pool)
        after, _ = torch.cuda.mem_get_info(self._device)
        return before - after

    def _run_padding(self, num_rows: int, query_len: int, seq_len: int) -> None:
        """Run a step of rows that write nothing and attend to block 0, or, where seq_len is 0, to nothing."""
        num_tokens = num_rows * query_len
        layout = StepLayout(num_tokens, num_rows, 0)
        packed = torch.zeros(layout.copies, dtype=torch.int32)
        packed[layout.slot_mapping : layout.query_start_loc] = -1
        packed[layout.query_start_loc : layout.seq_lens] = torch.arange(num_rows + 1) * query_len
        packed[layout.seq_lens : layout.block_tables] = seq_len
        self._step.inputs.upload(packed)
        self._step.forward(num_tokens, num_rows, query_len, query_len == 1)
        torch.cuda.current_stream().synchronize()

    def step_buffers(self) -> list[Int32Array]:
        """Three pinned buffers, each large enough for any step."""
        return [buffer.numpy() for buffer in self._host_buffers]

    def launch(self, plan: StepPlan) -> CudaPendingStep | FailedStep:
        """Enqueue a step; what goes wrong comes out of its `wait`."""
        header = Header(*plan.buffer[: len(Header._fields)].tolist())
        if self._thread != threading.get_ident():
            torch.cuda.set_device(self._device)  # lest what does not name a device sets one up on the first
            self._thread = threading.get_ident()
        try:
            captured = self._step.captured(header) if _is_plain(header) else None
            if captured is not None:
                return self._enqueue(captured, plan, header.num_rows)
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                return self._launch(plan, header)
        except Exception as error:
            return FailedStep(self._failure(error))

    def _failure(self, error: Exception) -> Exception:
        """What a step ends with whose launch failed with `error`: EngineDeadError where the GPU can do nothing after it.

        Kernels and graphs of our own report errors of the device like any other; so it is asked.
        """
        cause = error
        if not isinstance(error, torch.AcceleratorError):
            try:
                self._stream.query()
            except torch.AcceleratorError as of_device:
                cause = of_device
            else:
                return error
        failure = EngineDeadError(f"the GPU failed: {public_text(cause)}")
        failure.__cause__ = error  # for the log
        return failure

    def _enqueue(self, captured: CapturedStep, plan: StepPlan, num_rows: int) -> CudaPendingStep:
        """Start a step that is all captured, as most are. Torch's contexts, slices and copies would take longer than this
        call, and let other threads have the interpreter lock in between."""
        slot = plan.step_id % NUM_STEP_BUFFERS
        event = self._events[slot]
        self._enqueuer.enqueue(slot, plan.used, captured.executable, num_rows, event.cuda_event)
        return CudaPendingStep(event, StepResult(self._drawn_arrays[slot][:num_rows]))

    def _launch(self, plan: StepPlan, header: Header) -> CudaPendingStep:
        host_buffer = torch.from_numpy(plan.buffer[: plan.used])
        self._step.inputs.upload(host_buffer)
        self._step.run(header)
        tokens = self._step.inputs.last_token_ids[: header.num_rows]
        if header.num_extras or header.max_logprobs >= 0:
            result = self._draw_again(header, host_buffer, tokens)
        else:
            drawn = self._drawn[plan.step_id % NUM_STEP_BUFFERS][: header.num_rows]
            result = StepResult(drawn.copy_(tokens, non_blocking=True).numpy())
        if header.num_prompt_targets:
            packed = self._step.inputs.packed
            of_prompts = prompt_logprobs(self._step.logits_at, packed, header, len(self._step.logits))
            result = dataclasses.replace(result, prompt_logprobs=of_prompts)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return CudaPendingStep(done, result)

    def _draw_again(self, header: Header, host_buffer: torch.Tensor, tokens: torch.Tensor) -> StepResult:
        """Replace the drawn tokens by ones drawn with penalties and bans, and find the log probabilities."""
        inputs = self._step.inputs
        sampled = self._sampler(
            self._step.logits[: header.num_rows],
            inputs.packed,
            header,
            inputs.token_ids[: header.num_tokens],
            host_buffer,
        )
        tokens.copy_(sampled.token_ids)
        return _to_host(sampled)

    def shutdown(self) -> None:
        """Finish what was launched. The memory goes with the executor."""
        self._stream.synchronize()


def _is_plain(header: Header) -> bool:
    """Whether a step moves no blocks and wants nothing of its logits but the tokens that its forward pass draws."""
    moves_blocks = header.num_copies or header.num_swap_outs or header.num_swap_ins
    return not (moves_blocks or header.num_extras or header.num_prompt_targets) and header.max_logprobs < 0


def _to_host(sampled: SampledTokens) -> StepResult:
    """Enqueue the copies of a step's draws to pinned memory."""

    def copy(tensor: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True).numpy()

    if sampled.chosen_logprobs is None:
        return StepResult(copy(sampled.token_ids))
    assert sampled.chosen_ranks is not None and sampled.top_logprobs is not None and sampled.top_token_ids is not None
    return StepResult(
        copy(sampled.token_ids),
        copy(sampled.chosen_logprobs),
        copy(sampled.chosen_ranks),
        copy(sampled.top_logprobs),
        copy(sampled.top_token_ids),
    )


def _check_kernels_serve(model_config: ModelConfig, block_size: int) -> None:
    if model_config.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise ConfigError(f"head_dim must be one of {sizes} on a GPU; the model has {model_config.head_dim}")
    if block_size < MIN_BLOCK_SIZE:
        raise ConfigError(f"block_size must be at least {MIN_BLOCK_SIZE} on a GPU, got {block_size}")
