"""Composition root: the one file that knows every part of an engine and puts them together."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from pagedcore import _kernels
from pagedcore.config import EngineConfig
from pagedcore.engine.engine import Engine, EngineLimits
from pagedcore.engine.engine_thread import EngineThread
from pagedcore.engine.memory_policy import MemoryPolicy
from pagedcore.engine.queue_limits import QueueLimits
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.swap_space import PreemptionMode
from pagedcore.engine.telemetry import Recorder
from pagedcore.errors import ConfigError, RequestError
from pagedcore.execution.cuda import CudaExecutor, has_cuda_device
from pagedcore.execution.local import LocalExecutor
from pagedcore.models.config import ModelConfig
from pagedcore.serve.cache import SetupError
from pagedcore.serve.default_model import resolve_model
from pagedcore.text import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

DEFAULT_BATCHED_TOKENS = {"cpu": 1024, "cuda": 8192}

EngineT = TypeVar("EngineT", Engine, EngineThread)


@dataclass(frozen=True)
class LoadedEngine(Generic[EngineT]):
    """An engine ready for requests, and what its users need to know of the model."""

    engine: EngineT
    tokenizer: Tokenizer | None
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    config: EngineConfig

    def shutdown(self) -> None:
        """End what is unfinished, stop the threads and release the device."""
        self.engine.shutdown()
        gc.unfreeze()


def build_engine(config: EngineConfig, recorder: Recorder | None = None) -> LoadedEngine[EngineThread]:
    """Load a model and start its engine on a thread of its own; `recorder` gets its records. Raises ConfigError."""
    loaded = load_engine(config, recorder)
    engine = EngineThread(loaded.engine, QueueLimits(config.max_queue_size, config.max_queue_tokens), recorder)
    engine.start()
    return LoadedEngine(
        engine, loaded.tokenizer, loaded.max_model_len, loaded.vocab_size, loaded.eos_token_ids, loaded.config
    )


def load_engine(config: EngineConfig, recorder: Recorder | None = None) -> LoadedEngine[Engine]:
    """Load a model and build the engine that its user steps. Raises ConfigError."""
    begin = time.monotonic()
    try:
        folder = resolve_model(config.model)
    except SetupError as error:
        raise ConfigError(str(error)) from error
    model = ModelConfig.from_folder(folder)
    config = dataclasses.replace(config, device=_device(config.device, config.device_index))
    max_model_len = _max_model_len(config, model)
    executor_class = CudaExecutor if config.device == "cuda" else LocalExecutor
    executor = executor_class(config, model, folder, max_model_len, _max_batched_tokens(config, max_model_len))
    try:
        tokenizer = None if config.skip_tokenizer_init else load_tokenizer(Path(config.tokenizer or folder))
        engine = _build(config, model, executor, max_model_len, recorder)
        _pin_prefixes(config, engine, tokenizer)
    except Exception:
        executor.shutdown()
        raise
    # The garbage collector would walk through torch's and the model's objects again and again, for 0.1 s each time.
    gc.collect()
    gc.freeze()
    logger.info("ready after %.1f s: %s, max_model_len %d", time.monotonic() - begin, folder, max_model_len)
    return LoadedEngine(engine, tokenizer, max_model_len, model.vocab_size, tuple(model.eos_token_ids), config)


def _build(
    config: EngineConfig,
    model: ModelConfig,
    executor: LocalExecutor | CudaExecutor,
    max_model_len: int,
    recorder: Recorder | None,
) -> Engine:
    shape = executor.kv_cache_shape
    mode = PreemptionMode(config.preemption_mode)
    if mode is PreemptionMode.SWAP and shape.num_host_blocks == 0:
        raise ConfigError(
            f"preemption_mode 'swap' needs a swap_space of at least one block of {shape.block_size} tokens, "
            f"got {config.swap_space or 0:g} GiB"
        )
    policy = MemoryPolicy(config.kv_policy, max_model_len)
    blocks = policy.make_blocks(
        shape.num_blocks,
        shape.block_size,
        num_host_blocks=shape.num_host_blocks,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    if policy.reserves_max_model_len and blocks.blocks_needed(max_model_len) > blocks.max_blocks_per_sequence:
        raise ConfigError(
            f"kv_policy {config.kv_policy!r} reserves max_model_len = {max_model_len} tokens for every sequence, but the "
            f"longest contiguous range of the pool has {blocks.max_blocks_per_sequence} blocks of {blocks.block_size}"
        )
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=_max_batched_tokens(config, max_model_len),
            enable_prefix_caching=config.enable_prefix_caching,
            enable_chunked_prefill=config.enable_chunked_prefill,
            step_sizes=executor.step_sizes,
            preemption_mode=mode,
            swap_cost_tokens=shape.swap_cost_tokens,
        ),
        blocks,
        executor.step_buffers(),
        policy,
        recorder,
    )
    limits = EngineLimits(
        max_model_len, model.vocab_size, min(config.max_logprobs, model.vocab_size), frozenset(model.eos_token_ids)
    )
    return Engine(scheduler, executor, limits, seed=config.seed, one_step_ahead=config.async_scheduling)


def _pin_prefixes(config: EngineConfig, engine: Engine, tokenizer: Tokenizer | None) -> None:
    for number, prefix in enumerate(config.pinned_prefixes):
        if not isinstance(prefix, str):
            token_ids = list(prefix)
        elif tokenizer is not None:
            token_ids = tokenizer.encode(prefix)
        else:
            raise ConfigError(f"pinned_prefixes[{number}] must be token ids with skip_tokenizer_init, got a text")
        try:
            engine.pin_prefix(token_ids)
        except RequestError as error:
            raise ConfigError(f"pinned_prefixes[{number}]: {error}") from error
    stats = engine.stats()
    if config.pinned_prefixes:
        logger.info("pinned prefixes hold %d of %d blocks", stats.num_pinned_blocks, stats.num_blocks)


def _device(asked: str, index: int) -> str:
    if asked == "auto" and torch.cuda.is_available() and not _kernels.has_cuda:
        logger.warning("there is a GPU, but the kernels were built without CUDA (no nvcc then): running on the CPU")
    if asked == "cpu" or (asked == "auto" and not has_cuda_device()):
        return "cpu"
    if not has_cuda_device():
        raise ConfigError(
            "device must be auto or cpu here, got 'cuda': there is no NVIDIA GPU, or torch or the kernels were built without CUDA"
        )
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device_index must be in [0, {torch.cuda.device_count() - 1}], the GPUs that this process sees, got {index}"
        )
    return "cuda"


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_context_len
    if config.max_model_len > model.max_context_len:
        raise ConfigError(
            f"max_model_len must be at most {model.max_context_len} (the model's longest context), "
            f"got {config.max_model_len}"
        )
    return config.max_model_len


def _max_batched_tokens(config: EngineConfig, max_model_len: int) -> int:
    """The step's token budget: at least one token for each sequence, and a whole prompt where prompts are not chunked."""
    budget = config.max_num_batched_tokens
    if budget is None:
        budget = max(DEFAULT_BATCHED_TOKENS[config.device], config.max_num_seqs)
        return budget if config.enable_chunked_prefill else max(budget, max_model_len)
    if budget < config.max_num_seqs:
        raise ConfigError(f"max_num_batched_tokens must be at least max_num_seqs = {config.max_num_seqs}, got {budget}")
    if not config.enable_chunked_prefill and budget < max_model_len:
        raise ConfigError(
            f"without chunked prefill, max_num_batched_tokens must be at least max_model_len = {max_model_len}, got {budget}"
        )
    return budget
