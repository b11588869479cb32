"""The real model gives the same tokens under every schedule: batch, block size, chunks, pool, prefix cache, steps ahead."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from pagedcore import LLM, SamplingParams, TokensPrompt
from pagedcore.serve.default_model import ensure_default_model
from tests.models import tiny

NUM_PROMPTS, MAX_MODEL_LEN = 12, 128

# Each differs from the first in what its name says; the small pools force preemption and recomputation.
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {"num_gpu_blocks_override": 256},
    "block size 1": {"block_size": 1, "num_gpu_blocks_override": 4096},
    "block size 4": {"block_size": 4, "num_gpu_blocks_override": 1024},
    "block size 64": {"block_size": 64, "num_gpu_blocks_override": 64},
    "chunks of 16": {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 256},
    "chunks of 23": {"max_num_batched_tokens": 23, "num_gpu_blocks_override": 256},
    "small pool": {"block_size": 4, "num_gpu_blocks_override": 48},
    "smallest pool": {"num_gpu_blocks_override": 8},
    "no prefix cache": {"enable_prefix_caching": False, "num_gpu_blocks_override": 256},
    "no prefix cache, small pool": {"enable_prefix_caching": False, "block_size": 4, "num_gpu_blocks_override": 48},
    "swap, small pool": {
        "block_size": 4,
        "num_gpu_blocks_override": 48,
        "swap_space": 0.1,
        "preemption_mode": "swap",
    },
    "swap, smallest pool": {"num_gpu_blocks_override": 8, "swap_space": 0.1},
    "not ahead": {"async_scheduling": False, "num_gpu_blocks_override": 256},
    "not ahead, small pool": {"async_scheduling": False, "num_gpu_blocks_override": 10},
    "two at a time": {"max_num_seqs": 2, "num_gpu_blocks_override": 256},
}


def prompts() -> list[TokensPrompt]:
    """Half of them share a prefix of 40 tokens; lengths from 1 to 80."""
    shared = [(7 * i) % tiny.VOCAB_SIZE for i in range(40)]
    result = []
    for number in range(NUM_PROMPTS):
        own = [(number * 31 + 17 * i + i * i) % tiny.VOCAB_SIZE for i in range(1 + (number * 13) % 40)]
        result.append(TokensPrompt(prompt_token_ids=(shared if number % 2 else []) + own))
    return result


def parameters() -> list[SamplingParams]:
    """Greedy and seeded draws, filters and penalties, side by side."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.0, "seed": 6, "top_k": 12, "top_p": 0.9},
        {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"temperature": 0.7, "seed": 7, "min_p": 0.05, "repetition_penalty": 1.1},
        {"temperature": 0, "min_tokens": 9, "stop_token_ids": list(range(0, tiny.VOCAB_SIZE, 4))},
    ]
    return [
        SamplingParams(max_tokens=10 + 3 * number, ignore_eos=True, detokenize=False, **kind)
        for number, kind in zip(range(NUM_PROMPTS), itertools.cycle(kinds), strict=False)
    ]


def make_llm(folder: Path, **arguments: Any) -> LLM:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
    }
    return LLM(model=str(folder), **(settings | arguments))


# The real model in the dtype it is served in: prompts in chunks, decodes and recomputation must agree to the last bit.
REAL_SCHEDULES = [
    "plain",
    "block size 64",
    "chunks of 23",
    "small pool",
    "no prefix cache, small pool",
    "swap, small pool",
]


def generate(llm: LLM, chosen: list[int]) -> list[list[int]]:
    outputs = llm.generate([prompts()[i] for i in chosen], [parameters()[i] for i in chosen], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module", params=["llama", "qwen2", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.make(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    """Every prompt by itself, nothing cached."""
    llm = make_llm(model, num_gpu_blocks_override=64, enable_prefix_caching=False, async_scheduling=False)
    tokens = [generate(llm, [i])[0] for i in range(NUM_PROMPTS)]
    llm.shutdown()
    assert len({tuple(output) for output in tokens}) == NUM_PROMPTS, "the prompts are told apart"
    return tokens


@pytest.fixture(scope="module")
def alone_real() -> list[list[int]]:
    llm = make_llm(
        ensure_default_model(),
        dtype="bfloat16",
        num_gpu_blocks_override=64,
        enable_prefix_caching=False,
        async_scheduling=False,
    )
    tokens = [generate(llm, [i])[0] for i in range(NUM_PROMPTS)]
    llm.shutdown()
    return tokens


@pytest.mark.parametrize("schedule", REAL_SCHEDULES)
def test_same_tokens_of_the_default_model_in_bfloat16(alone_real: list[list[int]], schedule: str) -> None:
    llm = make_llm(ensure_default_model(), dtype="bfloat16", **SCHEDULES[schedule])
    tokens = generate(llm, list(range(NUM_PROMPTS)))
    stats = llm.stats()
    llm.shutdown()
    assert tokens == alone_real
    assert (stats.preemptions_total > 0) == ("pool" in schedule)


GROUP_SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {"num_gpu_blocks_override": 256},
    "chunks of 23": {"max_num_batched_tokens": 23, "num_gpu_blocks_override": 256},
    "recompute": {"num_gpu_blocks_override": 48, "block_size": 4},
    "recompute, no prefix cache": {"num_gpu_blocks_override": 48, "block_size": 4, "enable_prefix_caching": False},
    "swap": {"num_gpu_blocks_override": 48, "block_size": 4, "swap_space": 0.1, "preemption_mode": "swap"},
    "not ahead, swap": {"num_gpu_blocks_override": 14, "async_scheduling": False, "swap_space": 0.1},
    "pinned": {"num_gpu_blocks_override": 128, "pinned_prefixes": [[(7 * i) % tiny.VOCAB_SIZE for i in range(37)]]},
}


def group_parameters() -> list[SamplingParams]:
    kinds: list[dict[str, Any]] = [
        {"n": 3, "seed": 1},
        {"beam_width": 4, "n": 2, "temperature": 0},
        {"n": 2, "best_of": 4, "seed": 2, "repetition_penalty": 1.2},
        {"temperature": 0},
        {"beam_width": 2, "temperature": 0, "length_penalty": 0.0, "early_stopping": "never"},
        {"n": 2, "temperature": 0, "min_tokens": 9, "stop_token_ids": list(range(0, tiny.VOCAB_SIZE, 4))},
    ]
    return [
        SamplingParams(max_tokens=8 + number, ignore_eos=True, detokenize=False, **kind)
        for number, kind in zip(range(NUM_PROMPTS), itertools.cycle(kinds), strict=False)
    ]


def generate_groups(llm: LLM, chosen: list[int]) -> list[list[list[int]]]:
    outputs = llm.generate([prompts()[i] for i in chosen], [group_parameters()[i] for i in chosen], use_tqdm=False)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def groups_alone(model: Path) -> list[list[list[int]]]:
    llm = make_llm(model, num_gpu_blocks_override=64, enable_prefix_caching=False, async_scheduling=False)
    tokens = [generate_groups(llm, [i])[0] for i in range(NUM_PROMPTS)]
    llm.shutdown()
    return tokens


@pytest.mark.parametrize("schedule", list(GROUP_SCHEDULES))
def test_samples_and_beams_are_the_same_under_every_schedule(
    model: Path, groups_alone: list[list[list[int]]], schedule: str
) -> None:
    llm = make_llm(model, **GROUP_SCHEDULES[schedule])
    tokens = generate_groups(llm, list(range(NUM_PROMPTS)))
    stats = llm.stats()
    llm.shutdown()
    assert tokens == groups_alone
    assert (stats.preemptions_total > 0) == ("recompute" in schedule or "swap" in schedule)
    assert (stats.swapped_in_blocks_total > 0) == ("swap" in schedule)
    assert stats.num_free_blocks == stats.num_blocks - stats.num_pinned_blocks


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_same_tokens_under_every_schedule(model: Path, alone: list[list[int]], schedule: str) -> None:
    llm = make_llm(model, **SCHEDULES[schedule])
    first = generate(llm, list(range(NUM_PROMPTS)))
    again = generate(llm, list(reversed(range(NUM_PROMPTS))))[::-1]  # in another order, prefixes cached by now
    stats = llm.stats()
    llm.shutdown()
    assert first == alone
    assert again == alone
    assert (stats.preemptions_total > 0) == ("pool" in schedule)
    assert (stats.swapped_in_blocks_total > 0) == ("swap" in schedule)
    assert (stats.prefix_cache_hits_total > 0) == ("no prefix cache" not in schedule)
    assert stats.num_free_blocks == stats.num_blocks
