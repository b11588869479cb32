"""The engine on a GPU: the model's numbers beside transformers', graphs beside eager steps, memory as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pagedcore import LLM, SamplingParams, ops
from pagedcore.errors import ConfigError
from pagedcore.execution.cuda import captured_sizes, cuda_dtype
from pagedcore.execution.invariance import bits_are_alike
from pagedcore.serve.default_model import ensure_default_model
from tests.execution.cuda_cases import OPT_SHAPE, SHAPE, executor_of, generated, random_prompts
from tests.models import tiny

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Write a sentence about the sea.",
    "How many days are in a week?",
    "Explain photosynthesis to a child.",
    "What is 12 times 3?",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
)


def test_captured_sizes_reach_every_batch() -> None:
    for limit in (1, 3, 8, 100, 256, 300, 1000):
        step_sizes = captured_sizes(limit, 2048, 6e8)
        sizes = step_sizes.decode_rows
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] == limit
        assert sizes[: min(3, limit)] == (1, 2, 4)[: len(sizes)] or limit == 3
        assert list(step_sizes.prefill_rows) == sorted(set(step_sizes.prefill_rows))
        assert step_sizes.prefill_rows[-1] == limit


def test_prompts_are_captured_as_long_as_launching_takes_longer_than_their_work() -> None:
    assert captured_sizes(8, 8192, 6e8).prefill_tokens[-1] == 2048
    assert captured_sizes(8, 300, 6e8).prefill_tokens[-1] == 256
    assert captured_sizes(8, 8192, 8e9).prefill_tokens[-1] == 2048
    assert captured_sizes(8, 8192, 7e10).prefill_tokens == (64, 128, 192)
    assert captured_sizes(8, 8192, 4e11).prefill_tokens == ()


def test_dtype_on_a_gpu() -> None:
    assert cuda_dtype("auto", "float16") is torch.float16
    assert cuda_dtype("auto", "float32") is torch.bfloat16
    with pytest.raises(ConfigError, match=r"dtype must be one of auto, bfloat16, float16 on a GPU, got 'float32'"):
        cuda_dtype("float32", "float32")


def test_equal_rows_are_told_from_rows_that_round_otherwise() -> None:
    """Bits, not values: two NaN of the same bits are alike, and the zeros are not."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = torch.tensor([1.5, float("nan"), 0.0, -3.0], dtype=dtype).repeat(256, 1)
        assert bits_are_alike(rows)
        other = rows.clone()
        other[255, 2] = -0.0
        assert not bits_are_alike(other)
        rows[128, 3] = torch.nextafter(rows[128, 3], torch.zeros((), dtype=dtype))
        assert not bits_are_alike(rows)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "llama-biases", "opt", "opt-350m"])
def test_logprobs_are_as_near_as_transformers_own(variant: str, batch_invariant: bool, tmp_path: Path) -> None:
    reference = tiny.make(variant, tmp_path, **(OPT_SHAPE if variant.startswith("opt") else SHAPE))
    arguments: dict[str, Any] = {"max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 26}
    llm = LLM(str(tmp_path), device="cuda", skip_tokenizer_init=True, batch_invariant=batch_invariant, **arguments)
    prompts = random_prompts(12)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).cuda()
    ours, theirs = [], []
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        ids = torch.tensor([prompt["prompt_token_ids"]])
        exact = reference(ids).logits[0, -1].double().log_softmax(-1)
        rounded = half(ids.cuda()).logits[0, -1].double().log_softmax(-1).cpu()
        assert output.outputs[0].logprobs is not None
        for token, entry in output.outputs[0].logprobs[0].items():
            ours.append(entry.logprob - float(exact[token]))
            theirs.append(float(rounded[token] - exact[token]))
    llm.shutdown()
    assert torch.tensor(ours).norm() <= 1.25 * torch.tensor(theirs).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["llama", "qwen3", "opt", "opt-350m"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"batch_invariant": True},
    ],
)
def test_prompt_logprobs_are_as_near_as_transformers_own(
    variant: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Captured, eager, and in chunks; or in steps of one token, as decode steps are."""
    reference = tiny.make(variant, tmp_path, **(OPT_SHAPE if variant.startswith("opt") else SHAPE))
    settings: dict[str, Any] = {"max_num_seqs": 16, "skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 26}
    llm = LLM(str(tmp_path), device="cuda", **(settings | arguments))
    prompts = [
        *random_prompts(12),
        *({"prompt_token_ids": [7 + i, 9, 11]} for i in range(4)),
        {"prompt_token_ids": [3] * 17},
    ]
    params = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=5, ignore_eos=True)
    plain = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).cuda()
    ours, theirs = [], []
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = prompt["prompt_token_ids"]
        exact = reference(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        rounded = half(torch.tensor([ids]).cuda()).logits[0].double().log_softmax(-1).cpu()
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(ids)
        assert output.prompt_logprobs[0] is None
        for at, position in enumerate(output.prompt_logprobs[1:]):
            assert position is not None and next(iter(position)) == ids[at + 1] and 5 <= len(position) <= 6
            for token, entry in position.items():
                ours.append(entry.logprob - float(exact[at, token]))
                theirs.append(float(rounded[at, token] - exact[at, token]))
    assert torch.tensor(ours).norm() <= 1.25 * torch.tensor(theirs).norm()
    # What is drawn is what is drawn without them, but where a rounding decides a near tie.
    same = [
        a.outputs[0].token_ids == tokens
        for a, tokens in zip(outputs, generated(llm, prompts, [plain] * 17), strict=True)
    ]
    llm.shutdown()
    assert sum(same) >= 14, same


@pytest.mark.gpu
def test_the_default_model_answers_as_on_the_cpu() -> None:
    """In float32 there; where float16 says another token, it was nearly as likely."""
    questions = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in QUESTIONS]
    params = SamplingParams(temperature=0, max_tokens=64, logprobs=4, ignore_eos=True)
    answers = []
    for arguments in ({"device": "cuda", "dtype": "float16"}, {"device": "cpu", "dtype": "float32"}):
        llm = LLM(str(ensure_default_model()), max_model_len=512, max_num_seqs=8, **arguments)
        answers.append([output.outputs[0] for output in llm.generate(questions, params, use_tqdm=False)])
        llm.shutdown()
    num_same = 0
    for ours, exact in zip(*answers, strict=True):
        assert exact.logprobs is not None and ours.text.strip()
        parted = [i for i, (a, b) in enumerate(zip(ours.token_ids, exact.token_ids, strict=True)) if a != b]
        if parted:
            near = exact.logprobs[parted[0]]
            assert near[exact.token_ids[parted[0]]].logprob - near[ours.token_ids[parted[0]]].logprob < 0.1
        num_same += parted[0] if parted else len(ours.token_ids)
    assert num_same > len(questions) * 64 / 2


@pytest.mark.gpu
def test_graphs_draw_what_eager_steps_draw_at_every_batch_size(tmp_path: Path) -> None:
    tiny.make("qwen3", tmp_path, **SHAPE)
    arguments: dict[str, Any] = {"device": "cuda", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 26}
    llm = LLM(str(tmp_path), max_num_seqs=40, **arguments)
    graphs = executor_of(llm)._step._captured
    sizes = executor_of(llm).step_sizes
    assert sizes.decode_rows[-1] == 40 and sizes.prefill_tokens[-1] >= 512
    prefill = {(tokens, rows, False) for tokens in sizes.prefill_tokens for rows in sizes.prefill_rows}
    assert set(graphs) == prefill | {(rows, rows, True) for rows in sizes.decode_rows}
    kept = dict(graphs)
    for count in (1, 2, 3, 5, 8, 17, 40):
        prompts = random_prompts(count, count)
        params = [
            SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=12 + i % 5, ignore_eos=True)
            for i in range(count)
        ]
        graphs.update(kept)
        captured = generated(llm, prompts, params)
        graphs.clear()
        assert generated(llm, prompts, params) == captured
    llm.shutdown()


@pytest.mark.gpu
def test_rows_that_compute_nothing_draw_from_their_prompt(tmp_path: Path) -> None:
    """A step of one-token rows and of samples that share them, whose padded rows and tokens are as many."""
    tiny.make("qwen3", tmp_path, **SHAPE, initializer_range=0.4)
    arguments: dict[str, Any] = {"device": "cuda", "dtype": "float16", "skip_tokenizer_init": True, "max_num_seqs": 64}
    prompts = [*random_prompts(20, 5), {"prompt_token_ids": [7]}, {"prompt_token_ids": [9]}]
    params = [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True) for _ in range(20)]
    params.append(SamplingParams(temperature=0.8, seed=3, n=20, max_tokens=8, ignore_eos=True))
    params.append(SamplingParams(temperature=0, beam_width=4, max_tokens=8, ignore_eos=True))
    results = []
    for extra in ({}, {"enforce_eager": True}):
        llm = LLM(str(tmp_path), kv_cache_memory_bytes=1 << 26, **arguments, **extra)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append([[sequence.token_ids for sequence in output.outputs] for output in outputs])
        llm.shutdown()
    captured, eager = results
    same = [a == b for a, b in zip(captured, eager, strict=True)]
    assert captured[20] == eager[20] and captured[21] == eager[21]
    assert sum(same) >= 20, same  # a rounding may decide a near tie


@pytest.mark.gpu
def test_tokens_do_not_depend_on_pool_or_one_step_ahead(tmp_path: Path) -> None:
    """float16 and a peaked distribution, so that rounding does not decide."""
    tiny.make("llama", tmp_path, **SHAPE, initializer_range=0.4)
    prompts = random_prompts(24, 3)
    params = [
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, repetition_penalty=1.0 + 0.1 * (i % 2))
        for i in range(24)
    ]
    results = []
    small_pool = {"num_gpu_blocks_override": 40}
    swapping = small_pool | {"preemption_mode": "swap", "swap_space": 0.01}
    for extra in ({}, {"async_scheduling": False}, small_pool, swapping, {"max_num_batched_tokens": 32}):
        llm = LLM(
            str(tmp_path),
            device="cuda",
            dtype="float16",
            skip_tokenizer_init=True,
            max_num_seqs=32,
            max_model_len=128,
            **({"kv_cache_memory_bytes": 1 << 26} | extra),
        )
        results.append(generated(llm, prompts, params))
        assert (llm.stats().preemptions_total > 0) == ("num_gpu_blocks_override" in extra)
        llm.shutdown()
    same = [sum(a == b for a, b in zip(results[0], other, strict=True)) for other in results[1:]]
    assert min(same) >= 22, same  # a rounding may still decide a near tie


@pytest.mark.gpu
def test_a_library_that_computes_rows_in_different_ways_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inverse control of what `batch_invariant` tries at the start: some rows' sums are cut in two."""
    tiny.make("llama", tmp_path, **SHAPE)
    whole = ops.invariant_linear

    def split(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        middle = x.shape[1] // 2
        whole(x, weight, bias, out)[129:] = (x[129:, :middle] @ weight[:, :middle].t()) + (
            x[129:, middle:] @ weight[:, middle:].t()
        )
        return out

    monkeypatch.setattr(ops, "invariant_linear", split)
    with pytest.raises(ConfigError, match=r"batch_invariant must be false here: .*self_attn.qkv_proj \[768, 256\]"):
        LLM(str(tmp_path), device="cuda", skip_tokenizer_init=True, batch_invariant=True)
