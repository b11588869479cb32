"""vLLM's engine arguments that pagedcore does not have: which values change nothing here, and the refusal of all others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pagedcore.errors import ConfigError

logger = logging.getLogger(__name__)

# How the process logs, loads or warms up: no value of these changes an answer or a limit.
_IRRELEVANT_NAMES = """
    aggregate_engine_logging all2all_backend allowed_media_domains attention_config code_revision
    collect_detailed_traces compilation_config cp_kv_cache_interleave_size cuda_graph_sizes cudagraph_capture_sizes
    cudagraph_metrics data_parallel_address data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
    data_parallel_rank data_parallel_rpc_port data_parallel_size_local data_parallel_start_rank
    dbo_decode_token_threshold dbo_prefill_token_threshold dcp_kv_cache_interleave_size disable_async_output_proc
    disable_cascade_attn disable_chunked_mm_input disable_custom_all_reduce disable_hybrid_kv_cache_manager
    disable_log_requests disable_mm_preprocessor_cache disable_nccl_for_dp_synchronization
    distributed_executor_backend distributed_timeout_seconds download_dir enable_flashinfer_autotune
    enable_layerwise_nvtx_tracing enable_log_requests enable_logging_iteration_details enable_mfu_metrics
    enable_mm_processor_stats enable_multimodal_encoder_data_parallel eplb_config expert_placement_strategy
    fail_on_environ_validation guided_decoding_backend ignore_patterns interleave_mm_strings
    intial_incremental_detokenization_offset kernel_config kv_cache_metrics kv_cache_metrics_sample mamba_backend
    mamba_block_size mamba_cache_dtype mamba_cache_mode mamba_config mamba_ssm_cache_dtype master_addr master_port
    max_cudagraph_capture_size max_parallel_loading_workers max_prompt_adapter_token max_prompt_adapters
    max_seq_len_to_capture media_io_kwargs mm_encoder_attn_backend mm_encoder_tp_mode mm_processor_cache_gb
    mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_tensor_ipc model_loader_extra_config moe_backend
    multi_step_stream_outputs node_rank num_lookahead_slots num_scheduler_steps numa_bind numa_bind_cpus
    numa_bind_nodes optimization_level override_neuron_config performance_mode prefix_caching_hash_algo
    profiler_config pt_load_map_location ray_workers_use_nsight renderer_num_workers safetensors_load_strategy
    show_hidden_metrics_for_version shutdown_timeout skip_mm_profiling spec_decoding_acceptance_method
    tokenizer_pool_extra_config tokenizer_pool_size tokenizer_pool_type ubatch_size use_tqdm_on_load
    use_v2_block_manager video_pruning_rate worker_cls worker_extension_cls
"""
IRRELEVANT = frozenset(_IRRELEVANT_NAMES.split())

# What pagedcore lacks or fixes: these values ask for what it does anyway. None, vLLM's "not given", always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "additional_config": ({},),
    "allowed_local_media_path": ("",),
    "attention_backend": (),
    "calculate_kv_scales": (False,),
    "config_format": ("auto", "hf"),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0,),
    "data_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "default_mm_loras": (),
    "disable_sliding_window": (False,),
    "ec_transfer_config": (),
    "enable_dbo": (False,),
    "enable_elastic_ep": (False,),
    "enable_eplb": (False,),
    "enable_expert_parallel": (False,),
    "enable_lora": (False, "false"),
    "enable_lora_bias": (False,),
    "enable_mm_embeds": (False,),
    "enable_prompt_adapter": (False,),
    "enable_prompt_embeds": (False,),
    "enable_return_routed_experts": (False,),
    "enable_sleep_mode": (False,),
    "enable_tower_connector_lora": (False,),
    "fully_sharded_loras": (False,),
    "generation_config": ("auto", "vllm"),
    "hf_config_path": (),
    "hf_overrides": ({},),
    "hf_token": (),
    "io_processor_plugin": (),
    "kv_cache_dtype": ("auto",),
    "kv_events_config": (),
    "kv_offloading_size": (),
    "kv_sharing_fast_prefill": (False,),
    "kv_transfer_config": (),
    "language_model_only": (False,),
    "limit_mm_per_prompt": ({},),
    "logits_processor_pattern": (),
    "logits_processors": ([],),
    "logprobs_mode": ("raw_logprobs",),
    "long_lora_scaling_factors": (),
    "long_prefill_token_threshold": (0,),
    "lora_dtype": ("auto",),
    "lora_extra_vocab_size": (256,),
    "lora_target_modules": (),
    "max_cpu_loras": (),
    "max_long_partial_prefills": (1,),
    "max_lora_rank": (16,),
    "max_loras": (1,),
    "max_num_partial_prefills": (1,),
    "mm_encoder_attn_dtype": (),
    "mm_encoder_only": (False,),
    "mm_processor_kwargs": ({},),
    "model_impl": ("auto", "vllm"),
    "nnodes": (1,),
    "num_speculative_tokens": (),
    "otlp_traces_endpoint": (),
    "override_attention_dtype": (),
    "override_generation_config": ({},),
    "override_pooler_config": (),
    "pooler_config": (),
    "prefill_context_parallel_size": (1,),
    "qlora_adapter_name_or_path": (),
    "quantization": (),
    "quantization_config": (),
    "reasoning_config": (),
    "reasoning_parser": ("",),
    "reasoning_parser_plugin": (),
    "revision": (),
    "rope_parameters": (),
    "rope_scaling": ({},),
    "rope_theta": (),
    "runner": ("auto", "generate"),
    "scheduler_cls": (),
    "scheduler_delay_factor": (0,),
    "scheduling_policy": ("fcfs", "priority"),
    "served_model_name": (),
    "speculative_config": (),
    "speculative_draft_tensor_parallel_size": (),
    "speculative_model": (),
    "speculative_model_quantization": (),
    "stream_interval": (1,),
    "structured_outputs_config": ({},),
    "task": ("auto", "generate"),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (),
    "tokens_only": (False,),
    "weight_transfer_config": (),
}


def without_vllm_only(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that only vLLM has, each of which is named in a warning.

    Raises:
        ConfigError: one of them asks for something that pagedcore does not do.
    """
    own: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in IRRELEVANT:
            logger.warning("engine argument %s has no effect here", name)
        elif name in NEUTRAL:
            check_neutral(name, value)
            logger.warning("engine argument %s = %r is what this engine does anyway", name, value)
        else:
            own[name] = value
    return own


def check_neutral(name: str, value: Any) -> None:
    """Raise ConfigError unless an argument of NEUTRAL asks for nothing. True and 1 differ, 0 and 0.0 do not."""
    accepted = NEUTRAL[name]
    same_kind = [neutral for neutral in accepted if isinstance(neutral, bool) == isinstance(value, bool)]
    if value is not None and value not in same_kind:
        shown = " or ".join([*map(repr, accepted), "left out"])
        raise ConfigError(f"engine argument {name} is not supported in this version: it must be {shown}, got {value!r}")
