"""Tiny random models of every supported family and variant, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 131  # no multiple of any kernel's block
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "rms_norm_eps": 0.01,
}
_OPT_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "ffn_dim": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "init_std": 0.15,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}

# name -> (configuration class, what differs from its family's shape)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-multi-head": ("Llama", {"num_key_value_heads": 6}),
    "llama-multi-query": ("Llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("Llama", {"head_dim": 64}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-rope-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-rope-yarn": ("Llama", {"rope_parameters": _YARN}),
    "llama-rope-yarn-mscale": ("Llama", {"rope_parameters": _YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}}),
    "llama-rope-yarn-continuous": ("Llama", {"rope_parameters": _YARN | {"truncate": False, "attention_factor": 1.2}}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "qwen3-tied-biases": ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "opt": ("OPT", {}),
    "opt-heads-of-64": ("OPT", {"num_attention_heads": 3}),
    "opt-heads-of-80": ("OPT", {"hidden_size": 160, "num_attention_heads": 2}),
    "opt-heads-of-128": ("OPT", {"hidden_size": 256, "num_attention_heads": 2}),
    "opt-norm-behind": ("OPT", {"do_layer_norm_before": False}),
    "opt-projected": ("OPT", {"word_embed_proj_dim": 72}),
    "opt-350m": ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 72}),
    "opt-without-biases": ("OPT", {"enable_bias": False}),
    "opt-untied": ("OPT", {"tie_word_embeddings": False}),
}


def make(variant: str, folder: Path, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """Save a random float32 model in `folder` and return it. Biases and norms are random: none can hide."""
    family, differences = VARIANTS[variant]
    shape = _OPT_SHAPE if family == "OPT" else _SHAPE
    config = getattr(transformers, f"{family}Config")(**(shape | differences | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model
