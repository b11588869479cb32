"""pagedcore: a paged LLM engine behind NVIDIA Triton Inference Server.

The offline interface has vLLM's names: `LLM(model=...).generate(prompts, SamplingParams(...))`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagedcore.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pagedcore.llm import LLM, CompletionOutput, Logprob, RequestOutput, TokensPrompt

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "TokensPrompt"]


def __getattr__(name: str) -> Any:
    """Import the offline interface, and torch with it, only when it is used (PEP 562)."""
    if name in __all__:
        from pagedcore import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
