"""Beam search against transformers' `generate(num_beams=...)`, token for token, in float32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pagedcore import LLM, SamplingParams, TokensPrompt
from pagedcore.llm import RequestOutput
from pagedcore.serve.default_model import ensure_default_model
from tests.models import tiny

EOS = list(range(5, tiny.VOCAB_SIZE, 20))
# beams, outputs, length_penalty, early_stopping
RULES: list[tuple[int, int, float, bool | str]] = [
    (2, 1, 1.0, False),
    (3, 3, 1.0, True),
    (4, 4, 0.0, "never"),
    (4, 2, 2.0, False),
    (3, 3, 1.0, "never"),
    (4, 4, -1.0, True),
    (8, 8, 0.5, False),
]


def reference(model: Any, prompt: list[int], max_tokens: int, rule: tuple[int, int, float, bool | str]) -> Any:
    """[(output tokens without padding, score)], best first."""
    width, n, length_penalty, early_stopping = rule
    padding = model.config.vocab_size  # no token
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=n,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            max_new_tokens=max_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=padding,
        )
    sequences = output.sequences[:, len(prompt) :].tolist()
    return [
        ([token for token in sequence if token != padding], score)
        for sequence, score in zip(sequences, output.sequences_scores.tolist(), strict=True)
    ]


def parameters(rule: tuple[int, int, float, bool | str], max_tokens: int) -> SamplingParams:
    width, n, length_penalty, early_stopping = rule
    return SamplingParams(
        temperature=0,
        beam_width=width,
        n=n,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_tokens=max_tokens,
    )


def check(output: RequestOutput, expected: list[tuple[list[int], float]], length_penalty: float) -> None:
    assert [completion.token_ids for completion in output.outputs] == [tokens for tokens, _ in expected]
    for completion, (tokens, score) in zip(output.outputs, expected, strict=True):
        assert completion.cumulative_logprob is not None
        assert completion.cumulative_logprob / len(tokens) ** length_penalty == pytest.approx(score, abs=1e-3)


class Tiny:
    """A random model with several end-of-sequence tokens, so that beams often meet one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.make("llama", folder, eos_token_id=EOS, initializer_range=0.08)
        self.model.generation_config.eos_token_id = EOS

    def engine(self, **arguments: Any) -> LLM:
        settings = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 48}
        return LLM(model=str(self.folder), **(settings | arguments))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("beams"))


@pytest.fixture(scope="module")
def cases(tiny_model: Tiny) -> list[tuple[list[int], int, Any, Any]]:
    """(prompt, max_tokens, rule, what transformers makes of it)."""
    rng = random.Random(0)
    result = []
    for number in range(2 * len(RULES)):
        rule = RULES[number % len(RULES)]
        prompt = [rng.randrange(tiny.VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
        max_tokens = rng.randint(3, 16)
        result.append((prompt, max_tokens, rule, reference(tiny_model.model, prompt, max_tokens, rule)))
    lengths = {len(tokens) < max_tokens for _, max_tokens, _, expected in result for tokens, _ in expected}
    assert lengths == {False, True}, "some beams meet the end of sequence, others the limit"
    return result


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_gpu_blocks_override": 256},
        {"num_gpu_blocks_override": 256, "block_size": 4, "async_scheduling": False, "enable_prefix_caching": False},
        {"num_gpu_blocks_override": 100, "block_size": 4},
        {"num_gpu_blocks_override": 100, "block_size": 4, "swap_space": 0.1, "preemption_mode": "swap"},
        {"num_gpu_blocks_override": 400, "block_size": 1, "max_num_batched_tokens": 48, "swap_space": 0.1},
    ],
    ids=["one by one", "not ahead", "recomputed", "swapped", "small blocks"],
)
def test_beams_equal_those_of_transformers(
    tiny_model: Tiny, cases: list[tuple[list[int], int, Any, Any]], arguments: dict[str, Any]
) -> None:
    """All requests in one batch, with sampled and greedy ones between them."""
    llm = tiny_model.engine(**arguments)
    prompts, params = [], []
    for prompt, max_tokens, rule, _ in cases:
        prompts += [TokensPrompt(prompt_token_ids=prompt)] * 2
        params += [parameters(rule, max_tokens), SamplingParams(n=2, seed=3, max_tokens=max_tokens)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    stats = llm.stats()
    llm.shutdown()
    for output, (_, _, rule, expected) in zip(outputs[::2], cases, strict=True):
        check(output, expected, rule[2])
    assert stats.num_free_blocks == stats.num_blocks
    is_tight = arguments["num_gpu_blocks_override"] in (100, 400)
    assert (stats.preemptions_total > 0) == is_tight
    assert (stats.swapped_in_blocks_total > 0) == ("swap_space" in arguments)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[LLM, Any]]:
    folder = ensure_default_model()
    llm = LLM(model=str(folder), dtype="float32", max_model_len=256, max_num_seqs=8)
    yield llm, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    llm.shutdown()


@pytest.mark.parametrize("rule", [(4, 4, 1.0, False), (3, 2, 0.6, True)])
def test_beams_of_the_default_model_equal_those_of_transformers(smollm2: tuple[LLM, Any], rule: Any) -> None:
    llm, model = smollm2
    prompt = llm.get_tokenizer().encode("The capital of France is")
    output = llm.generate(TokensPrompt(prompt_token_ids=prompt), parameters(rule, 20), use_tqdm=False)[0]
    check(output, reference(model, prompt, 20, rule), rule[2])
