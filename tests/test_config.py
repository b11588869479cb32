"""Engine arguments: vLLM's names, checked, with errors that say what to change."""

from __future__ import annotations

import pytest

from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError


def test_vllm_argument_names_are_accepted() -> None:
    config = EngineConfig.from_dict(
        {
            "model": "/models/x",
            "dtype": "bfloat16",
            "max_model_len": 4096,
            "gpu_memory_utilization": 0.5,
            "enforce_eager": True,
            "swap_space": 2,
            "tensor_parallel_size": 1,
            "disable_log_stats": True,
            "seed": 7,
            "load_format": "dummy",
        }
    )
    assert (config.dtype, config.max_model_len, config.block_size, config.enable_prefix_caching) == (
        "bfloat16",
        4096,
        16,
        True,
    )


def test_unknown_argument_is_refused_with_the_valid_ones_and_a_guess() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown engine argument 'max_modellen'. Did you mean 'max_model_len'"
    ) as caught:
        EngineConfig.from_dict({"model": "x", "max_modellen": 1})
    for name in ("gpu_memory_utilization", "swap_space", "enable_prefix_caching"):
        assert name in str(caught.value)


def test_null_means_left_out_and_dtypes_have_short_names() -> None:
    config = EngineConfig.from_dict({"model": "x", "max_num_seqs": None, "seed": None, "dtype": "half"})
    assert config == EngineConfig(model="x", dtype="float16")
    assert EngineConfig(model="x", dtype="float").dtype == "float32"


def test_vllms_other_arguments_are_taken_where_they_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    arguments = {
        "disable_log_requests": True,
        "distributed_executor_backend": "mp",
        "quantization": None,
        "kv_cache_dtype": "auto",
        "enable_lora": "false",
        "cpu_offload_gb": 0.0,
        "scheduling_policy": "fcfs",
        "limit_mm_per_prompt": {},
    }
    assert EngineConfig.from_dict({"model": "x"} | arguments) == EngineConfig(model="x")
    assert all(any(name in record.getMessage() for record in caplog.records) for name in arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "x", "quantization": "awq"}, "quantization is not supported .* must be left out, got 'awq'"),
        ({"model": "x", "kv_cache_dtype": "fp8"}, "kv_cache_dtype .* must be 'auto' or left out, got 'fp8'"),
        ({"model": "x", "enable_lora": True}, "enable_lora is not supported .* got True"),
        ({"model": "x", "speculative_config": {"method": "ngram"}}, "speculative_config is not supported"),
        ({"model": "x", "scheduling_policy": "sjf"}, "scheduling_policy .* must be 'fcfs' or 'priority' or left out"),
        ({"model": "x", "max_queue_size": -1}, "max_queue_size must be an integer at least 0, got -1"),
        ({"model": "x", "max_queue_tokens": 1.5}, "max_queue_tokens must be an integer at least 0, got 1.5"),
        ({"model": "x", "cpu_offload_gb": 4}, "cpu_offload_gb is not supported .* must be 0 or left out, got 4"),
        ({"model": "x", "data_parallel_size": True}, "data_parallel_size is not supported .* got True"),
        ({}, "engine argument 'model' is required"),
        ({"model": ""}, "model must be the path"),
        ({"model": 3}, "model must be the path"),
        ({"model": "x", "dtype": "int3"}, "dtype must be one of auto, bfloat16, float16, float32, got 'int3'"),
        ({"model": "x", "dtype": ["auto"]}, r"dtype must be one of auto, .*, got \['auto'\]"),
        ({"model": "x", "dtype": {}}, r"dtype must be one of auto, .*, got {}"),
        ({"model": "x", "device": ["cpu"]}, "device must be one of auto, cpu, cuda, got"),
        ({"model": "x", "num_threads": 10**9}, r"num_threads must be an integer in \[1, 1024\], got 1000000000"),
        (
            {"model": "x", "max_num_batched_tokens": 2**31},
            r"max_num_batched_tokens must be an integer in \[1, 1048576\]",
        ),
        ({"model": "x", "block_size": 12}, "block_size must be one of .*, got 12"),
        ({"model": "x", "block_size": True}, "block_size must be one of .*, got True"),
        ({"model": "x", "block_size": 16.0}, "block_size must be one of .*, got 16.0"),
        ({"model": "x", "tokenizer": 3}, "tokenizer must be the path .*, got 3"),
        ({"model": "x", "max_model_len": 0}, "max_model_len must be an integer at least 1, got 0"),
        ({"model": "x", "max_model_len": 10.5}, "max_model_len must be an integer at least 1, got 10.5"),
        ({"model": "x", "max_num_seqs": 5000}, r"max_num_seqs must be an integer in \[1, 4096\], got 5000"),
        (
            {"model": "x", "gpu_memory_utilization": 1.5},
            r"gpu_memory_utilization must be a number in \[0.01, 1.0\], got 1.5",
        ),
        ({"model": "x", "gpu_memory_utilization": float("nan")}, "gpu_memory_utilization must be a number"),
        ({"model": "x", "swap_space": "4"}, "swap_space must be a number"),
        ({"model": "x", "preemption_mode": "drop"}, "preemption_mode must be one of auto, recompute, swap, got 'drop'"),
        ({"model": "x", "pinned_prefixes": "text"}, "pinned_prefixes must be a list of texts or lists of token ids"),
        (
            {"model": "x", "pinned_prefixes": ["a", [1, -2]]},
            r"pinned_prefixes\[1\] must be a text or a list of token ids",
        ),
        ({"model": "x", "pinned_prefixes": [""]}, r"pinned_prefixes\[0\] must be a text .*, got ''"),
        ({"model": "x", "enforce_eager": "yes"}, "enforce_eager must be true or false, got 'yes'"),
        ({"model": "x", "batch_invariant": 1}, "batch_invariant must be true or false, got 1"),
        ({"model": "x", "trust_remote_code": True}, "trust_remote_code must be false"),
        ({"model": "x", "tensor_parallel_size": 2}, "tensor_parallel_size must be 1"),
    ],
)
def test_bad_values_are_refused_by_name_range_and_value(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_dict(arguments)
