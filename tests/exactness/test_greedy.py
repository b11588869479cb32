"""Greedy tokens of the engine against those that transformers generated from the same prompts, in float32."""

from __future__ import annotations

from pagedcore import LLM, SamplingParams, TokensPrompt
from pagedcore.serve.default_model import ensure_default_model
from tests.exactness import reference

EVERY, NUM_TOKENS = 8, 64  # a slice of what `make exactness` compares


def test_tokens_equal_those_of_transformers() -> None:
    chosen = reference.load()[::EVERY]
    assert len(chosen) == 25
    llm = LLM(model=str(ensure_default_model()), dtype="float32", max_model_len=1024)
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=continuation.prompt_token_ids) for continuation in chosen],
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    llm.shutdown()
    for continuation, output in zip(chosen, outputs, strict=True):
        token_ids = output.outputs[0].token_ids
        assert len(token_ids) == NUM_TOKENS
        agreement = reference.compare(continuation, token_ids)
        assert agreement.excused, (continuation.source, agreement.num_equal)
