"""Which class runs which architecture."""

from __future__ import annotations

from collections.abc import Callable

from pagedcore.layers.linear import Placement
from pagedcore.models.causal_lm import CausalLM
from pagedcore.models.config import ModelConfig
from pagedcore.models.llama import LlamaForCausalLM
from pagedcore.models.opt import OPTForCausalLM

# Arguments: the configuration, the longest context (it bounds the positions), the placement.
MODELS: dict[str, Callable[[ModelConfig, int, Placement], CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": LlamaForCausalLM,
    "OPTForCausalLM": OPTForCausalLM,
}
