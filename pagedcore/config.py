"""The engine's configuration, with vLLM's argument names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedcore.errors import ConfigError, RequestError
from pagedcore.json_text import parse_json_object
from pagedcore.vllm_arguments import without_vllm_only

DTYPES = ("auto", "bfloat16", "float16", "float32")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
LOAD_FORMATS = ("auto", "safetensors", "dummy")
DEVICES = ("auto", "cpu", "cuda")
PREEMPTION_MODES = ("auto", "recompute", "swap")
# Paged, or the baselines of the PagedAttention paper: engine/memory_policy.py.
KV_POLICIES = ("paged", "orca_oracle", "orca_pow2", "orca_max", "static_batch")
MAX_BATCHED_TOKENS = 1 << 20
MAX_THREADS = 1024
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class EngineConfig:
    """Everything that shapes an engine. Names and meanings are those of vLLM's engine arguments where it has them.

    `None` means: chosen when the engine is built, from the model, the device and its memory.
    `device_index` (not vLLM's): which one of the GPUs that this process sees.
    `max_queue_size` and `max_queue_tokens` (not vLLM's) bound the requests that wait to be admitted and the prompt tokens of
    these together; what exceeds them is refused at once, except when none waits. 0: no bound.
    `preemption_mode`: what happens to the K/V of a preempted request: "recompute", "swap" to `swap_space` GiB of host memory
    (None: 4 beside a GPU, 0 on a CPU, whose KV cache is host memory already), or "auto", by estimated cost.
    `pinned_prefixes`: texts or lists of token ids, computed at the start and kept in the KV cache; requests that begin with
    one (token for token, and without a cache salt) share it.
    `kv_cache_memory_bytes`: bytes. `gpu_memory_utilization`: share of the device's memory, for
    weights, KV cache and workspace together; on a CPU, share of the memory that is free after loading, at most
    `max_num_seqs` sequences of `max_model_len` tokens and 4 GiB, unless `kv_cache_memory_bytes` says otherwise.
    `batch_invariant` (not one of vLLM's arguments): logits must be the same bits whatever else a step computes, and however the
    request got there: in chunks, from the prefix cache, after a preemption. The CPU's kernels have no other way to compute; on a
    GPU it takes longer.
    `kv_policy` (not one of vLLM's): "paged", or a baseline to compare it with, which reserves contiguous memory for whole
    sequences and has no prefix cache: "orca_oracle", "orca_pow2", "orca_max", "static_batch".
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    device: str = "auto"
    device_index: int = 0
    seed: int = 0
    load_format: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    kv_policy: str = "paged"
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_queue_size: int = 10_000
    max_queue_tokens: int = 4_000_000
    max_logprobs: int = 20
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    swap_space: float | None = None
    preemption_mode: str = "auto"
    pinned_prefixes: Sequence[str | Sequence[int]] = ()
    enforce_eager: bool = False
    batch_invariant: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    num_threads: int | None = None
    disable_log_stats: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        self._check_choice("dtype", DTYPES)
        self._check_choice("device", DEVICES)
        self._check_choice("load_format", LOAD_FORMATS)
        self._check_choice("block_size", BLOCK_SIZES)
        self._check_choice("kv_policy", KV_POLICIES)
        for name, high in (
            ("max_model_len", None),
            ("max_num_batched_tokens", MAX_BATCHED_TOKENS),
            ("num_gpu_blocks_override", None),
            ("num_threads", MAX_THREADS),
            ("kv_cache_memory_bytes", None),
        ):
            if getattr(self, name) is not None:
                self._check_integer(name, 1, high)
        self._check_integer("max_num_seqs", 1, 4096)
        self._check_integer("device_index", 0)
        self._check_integer("max_queue_size", 0)
        self._check_integer("max_queue_tokens", 0)
        self._check_integer("max_logprobs", 0, 1000)
        self._check_integer("seed", 0, 2**63 - 1)
        self._check_integer("tensor_parallel_size", 1)
        self._check_integer("pipeline_parallel_size", 1)
        self._check_number("gpu_memory_utilization", 0.01, 1.0)
        self._check_choice("preemption_mode", PREEMPTION_MODES)
        self._check_pinned_prefixes()
        if self.swap_space is not None:
            self._check_number("swap_space", 0.0, 1e6)
        if self.kv_policy != "paged":
            self._check_baseline()
        for field in dataclasses.fields(self):
            if field.type in ("bool", bool) and not isinstance(getattr(self, field.name), bool):
                raise ConfigError(f"{field.name} must be true or false, got {getattr(self, field.name)!r}")
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must be the path of a Hugging Face model folder, got {self.model!r}")
        if self.tokenizer is not None and (not isinstance(self.tokenizer, str) or not self.tokenizer):
            raise ConfigError(f"tokenizer must be the path of a Hugging Face tokenizer folder, got {self.tokenizer!r}")
        if self.trust_remote_code:
            raise ConfigError("trust_remote_code must be false: pagedcore never runs code from a model folder")
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) != 1:
                raise ConfigError(f"{name} must be 1 (this version runs on one device), got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, arguments: Mapping[str, Any]) -> EngineConfig:
        """Build from a mapping such as model.json.

        Raises:
            ConfigError: a key is neither here nor vLLM's (the text lists the valid ones), or asks for what is not there.
        """
        valid = [field.name for field in dataclasses.fields(cls)]
        arguments = without_vllm_only(arguments)
        for key in arguments:
            if key not in valid:
                near = difflib.get_close_matches(key, valid, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown engine argument {key!r}.{hint} Valid ones: {', '.join(valid)}")
        arguments = {key: value for key, value in arguments.items() if value is not None}  # null means: not given
        if "model" not in arguments:
            raise ConfigError("engine argument 'model' is required: the path of a Hugging Face model folder")
        return cls(**arguments)

    def _check_baseline(self) -> None:
        """A baseline among the memory policies neither shares blocks nor preempts."""
        for name, wanted, is_wrong in (
            ("pinned_prefixes", "empty", bool(self.pinned_prefixes)),
            ("swap_space", "0 or left out", bool(self.swap_space)),
            ("preemption_mode", "auto or recompute", self.preemption_mode == "swap"),
        ):
            if is_wrong:
                raise ConfigError(
                    f"{name} must be {wanted} with kv_policy {self.kv_policy!r}, which shares and preempts nothing, "
                    f"got {getattr(self, name)!r}"
                )

    def _check_pinned_prefixes(self) -> None:
        given = self.pinned_prefixes
        if not isinstance(given, (list, tuple)):
            raise ConfigError(f"pinned_prefixes must be a list of texts or lists of token ids, got {given!r}")
        for number, prefix in enumerate(given):
            is_ids = isinstance(prefix, (list, tuple)) and all(type(token) is int and token >= 0 for token in prefix)
            if not (isinstance(prefix, str) or is_ids) or not prefix:
                raise ConfigError(f"pinned_prefixes[{number}] must be a text or a list of token ids, got {prefix!r}")

    def _check_choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed or type(value) is not type(allowed[0]):
            raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")

    def _check_integer(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"in [{low}, {high}]"
            raise ConfigError(f"{name} must be an integer {limit}, got {value!r}")

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ConfigError(f"{name} must be a number in [{low}, {high}], got {value!r}")


def read_engine_arguments(path: Path) -> dict[str, Any]:
    """The engine arguments of a model.json, as `EngineConfig.from_dict` takes them; their values are not looked at.

    Raises:
        ConfigError: the file cannot be read, or is not one JSON object in UTF-8 as `parse_json_object` demands it.
    """
    try:
        return parse_json_object(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RequestError) as error:
        raise ConfigError(f"the engine's arguments cannot be read: {error}") from error
