"""ModelConfig: config.json files old and new are read as transformers reads them; the rest is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pagedcore.errors import ConfigError
from pagedcore.layers.rotary import rotary_table
from pagedcore.models.config import ModelConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def read(folder: Path, changes: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_absent_fields_are_derived(tmp_path: Path) -> None:
    config = read(tmp_path, {})
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (4, 16, 1e-6)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == (False, False, False, False)
    assert (config.tie_word_embeddings, config.dtype, config.eos_token_ids) == (False, "float32", ())
    assert config.rope is not None and config.rope.theta == 10000.0


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ],
    ids=str,
)
def test_rotary_table_is_that_of_transformers_for_old_and_new_config_files(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = read(tmp_path, changes)
    assert config.rope is not None
    theirs = transformers.LlamaConfig.from_pretrained(tmp_path)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    positions = torch.arange(config.max_position_embeddings)
    cos, sin = rotary(torch.zeros(1), positions[None])
    half = config.head_dim // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=1)
    ours = rotary_table(config.rope, config.head_dim, config.max_position_embeddings, torch.device("cpu"))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_biases_follow_the_architecture(tmp_path: Path) -> None:
    qwen2 = read(tmp_path, {"architectures": ["Qwen2ForCausalLM"]})
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    qwen3 = read(tmp_path, {"architectures": ["Qwen3ForCausalLM"]})
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.mlp_bias, qwen3.qk_norm) == (False, False, False, True)
    assert qwen3.head_dim == 128
    llama = read(tmp_path, {"attention_bias": True, "mlp_bias": True})
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias, llama.qk_norm) == (True, True, True, False)


def test_eos_ids_join_both_files(tmp_path: Path) -> None:
    assert read(tmp_path, {"eos_token_id": 2}).eos_token_ids == (2,)
    assert read(tmp_path, {"eos_token_id": [7, 2]}, {"eos_token_id": [2, 9]}).eos_token_ids == (7, 2, 9)
    assert read(tmp_path, {"eos_token_id": None}, {"eos_token_id": 5}).eos_token_ids == (5,)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_checkpoint_dtype_under_both_names(name: str, tmp_path: Path) -> None:
    assert read(tmp_path, {name: "bfloat16"}).dtype == "bfloat16"


def test_context_length_includes_the_rope_scaling(tmp_path: Path) -> None:
    assert read(tmp_path, {}).max_context_len == 2048
    assert read(tmp_path, {"rope_scaling": {"type": "linear", "factor": 4.0}}).max_context_len == 8192
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert read(tmp_path, {"rope_scaling": yarn}).max_context_len == 8192
    assert read(tmp_path, {"rope_scaling": yarn, "max_position_embeddings": 8192}).max_context_len == 8192


def test_unused_sliding_window_is_accepted(tmp_path: Path) -> None:
    read(tmp_path, {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 4096})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures must name one of Llama.*got .'GPT2LMHeadModel'"),
        ({"architectures": None}, "architectures must name one of .* got None"),
        ({"hidden_size": None}, "hidden_size must be an integer at least 1, got None"),
        ({"vocab_size": "many"}, "vocab_size must be an integer at least 1, got 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer at least 1, got 0"),
        ({"num_attention_heads": True}, "num_attention_heads must be an integer at least 1, got True"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads must divide num_attention_heads \(4\), got 3"),
        ({"head_dim": 15}, "head_dim must be a multiple of 16, at most 256, .* got 15"),
        ({"head_dim": 8}, "head_dim must be a multiple of 16, at most 256, .* got 8"),
        ({"head_dim": 272}, "head_dim must be a multiple of 16, at most 256, .* got 272"),
        ({"eos_token_id": list(range(65))}, "eos_token_id must be at most 64 ids, are 65"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a number above 0, got -1.0"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"sliding_window": 512}, "sliding_window is not supported.* got 512"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 512},
            "sliding_window is not supported.* got 512",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must all be 'full_attention'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is not supported.*awq"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"torch_dtype": "int8"}, "torch_dtype must be float32, bfloat16 or float16, got 'int8'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them, got '</s>'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: type must be one of .* got 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor must be a number above 0, got None"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters: low_freq_factor must be"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "rope_scaling: high_freq_factor must be above low"),
        ({"rope_theta": 1}, "rope_theta must be a number above 1, got 1"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type must be one of .* got 'longrope'"),
        ({"rope_parameters": "yes"}, "rope_parameters must be an object, got 'yes'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name_and_value(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {text}"):
        read(tmp_path, changes)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no_such.* is not a folder"):
        ModelConfig.from_folder(tmp_path / "no_such")
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        ModelConfig.from_folder(tmp_path)
    for text in ('{"architectures": [', "\x00", "[1]", '"text"'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json (cannot be read|must hold a JSON object)") as caught:
            ModelConfig.from_folder(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read"):
        ModelConfig.from_folder(tmp_path)
