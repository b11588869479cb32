"""The same requests under many schedules, and whether the log probabilities they get are the same bits."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagedcore import LLM, SamplingParams, TokensPrompt
from pagedcore.llm import RequestOutput
from pagedcore.serve.default_model import ensure_default_model

NUM_LOGPROBS = 50
NUM_TOKENS = 24
# Shorter and longer than a chunk of the attention kernels (256), and around its boundary.
LENGTHS = (1, 17, 250, 256, 300, 530, 96, 256)
SHARED = 100  # the last three prompts begin alike


@dataclass(frozen=True)
class Schedule:
    """How an engine goes about the requests, which is to make no difference, and what shows that it did so."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    preempts: bool = False
    swaps: bool = False
    twice: bool = False  # the prompts come again, and are found in the prefix cache
    is_quick: bool = True  # runs with the tests; the others differ little from one that does
    on_gpu: bool = True  # a GPU has something to show for it


RECOMPUTED = {"num_gpu_blocks_override": 60, "preemption_mode": "recompute"}
WITHOUT_GRAPHS = Schedule("without graphs", {"enforce_eager": True})
SCHEDULES = (
    Schedule("batched"),
    Schedule("chunks of 16", {"max_num_batched_tokens": 16}, is_quick=False),
    Schedule("chunks of 37", {"max_num_batched_tokens": 37}),
    Schedule("blocks of 1", {"block_size": 1, "num_gpu_blocks_override": 4096}, on_gpu=False),
    Schedule("blocks of 64", {"block_size": 64, "num_gpu_blocks_override": 64}, is_quick=False),
    Schedule("prefix cache", twice=True, is_quick=False),
    Schedule("prefix cache, chunks of 37", {"max_num_batched_tokens": 37}, twice=True),
    Schedule("recomputed", RECOMPUTED | {"enable_prefix_caching": False}, preempts=True),
    Schedule("recomputed, prefix cache", RECOMPUTED, preempts=True, is_quick=False),
    Schedule(
        "swapped",
        {"num_gpu_blocks_override": 60, "swap_space": 0.1, "preemption_mode": "swap", "enable_prefix_caching": False},
        preempts=True,
        swaps=True,
    ),
    Schedule("one step at a time", {"async_scheduling": False}, is_quick=False),
    WITHOUT_GRAPHS,
    Schedule("one thread", {"num_threads": 1}, on_gpu=False),
)


@dataclass(frozen=True)
class Position:
    """What a request got for one token: the chosen id, and the most likely ids with their log probabilities as bits."""

    token_id: int
    top: tuple[tuple[int, bytes], ...]


Positions = list[list[Position]]


def prompts() -> list[TokensPrompt]:
    """Token ids that are no text: the numbers are all that counts."""
    shared = [(7919 * i + 11) % 40_000 for i in range(SHARED)]
    result = []
    for number, length in enumerate(LENGTHS):
        own = [(number * 7013 + 104_729 * i + i * i) % 40_000 for i in range(length)]
        result.append(TokensPrompt(prompt_token_ids=(shared if number >= len(LENGTHS) - 3 else []) + own))
    return result


def parameters() -> list[SamplingParams]:
    """Greedy and drawn in turn: a draw depends on the logits' bits as well."""
    return [
        SamplingParams(
            max_tokens=NUM_TOKENS + number,
            temperature=number % 2 * 0.8,
            seed=number,
            logprobs=NUM_LOGPROBS,
            ignore_eos=True,
            detokenize=False,
        )
        for number in range(len(LENGTHS))
    ]


def make_llm(dtype: str, model: Path | None, **arguments: Any) -> LLM:
    """A model (None: the default one) in a mode that promises equal bits, unless the arguments say otherwise."""
    settings: dict[str, Any] = {
        "batch_invariant": True,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "max_logprobs": NUM_LOGPROBS,
        "num_gpu_blocks_override": 256,
    }
    return LLM(model=str(model or ensure_default_model()), **(settings | arguments))


def alone(dtype: str, model: Path | None = None, **arguments: Any) -> Positions:
    """Every request by itself in an engine, with these arguments, that keeps nothing of the others."""
    llm = make_llm(dtype, model, enable_prefix_caching=False, **arguments)
    result = [_generate(llm, [number])[0] for number in range(len(LENGTHS))]
    llm.shutdown()
    return result


def under(schedule: Schedule, dtype: str, model: Path | None = None, **arguments: Any) -> list[Positions]:
    """All requests together, once or twice. Raises AssertionError where the schedule was not what it is named for."""
    llm = make_llm(dtype, model, **(schedule.arguments | arguments))
    everything = range(len(LENGTHS))
    rounds = [_generate(llm, everything)]
    hits = llm.stats().prefix_cache_hits_total
    if schedule.twice:
        rounds.append(_generate(llm, everything[::-1])[::-1])
    stats = llm.stats()
    llm.shutdown()
    assert (stats.preemptions_total > 0) == schedule.preempts
    assert (stats.swapped_in_blocks_total > 0) == schedule.swaps
    assert (stats.prefix_cache_hits_total - hits > 1000) == schedule.twice
    return rounds


def num_different(results: Sequence[Positions], expected: Positions) -> int:
    """Output positions with another token, another order or other bits, of all rounds."""
    return sum(
        ours != theirs
        for result in results
        for row, row_expected in zip(result, expected, strict=True)
        for ours, theirs in zip(row, row_expected, strict=True)
    )


def _generate(llm: LLM, chosen: Sequence[int]) -> Positions:
    outputs = llm.generate([prompts()[i] for i in chosen], [parameters()[i] for i in chosen], use_tqdm=False)
    return [_positions(output) for output in outputs]


def _positions(output: RequestOutput) -> list[Position]:
    completion = output.outputs[0]
    assert completion.logprobs is not None
    bits = functools.partial(struct.pack, "<d")
    return [
        Position(token_id, tuple((other, bits(entry.logprob)) for other, entry in position.items()))
        for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
