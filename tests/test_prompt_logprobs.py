"""Log probabilities of prompts through the offline interface, with transformers' logits as the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore import LLM, SamplingParams, TokensPrompt
from pagedcore.errors import NonFiniteLogitsError, RequestError
from pagedcore.llm import Logprob
from tests.models import tiny

NUM_TOP = 4
MARGIN = 1e-4  # logits that are nearer to each other may change places
LENGTHS = (1, 2, 47, 130, 64)
WANTING: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "prompt_logprobs": NUM_TOP}
POOL: dict[str, Any] = {"block_size": 8, "num_gpu_blocks_override": 128}
SCHEDULES: dict[str, dict[str, Any]] = {
    "chunks": {"max_num_batched_tokens": 16},
    "a token a step": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "eager, few rows": {"enforce_eager": True, "max_num_seqs": 2},
    "recomputed": {"num_gpu_blocks_override": 34, "max_num_batched_tokens": 16},
    "swapped": {"num_gpu_blocks_override": 34, "swap_space": 0.1, "preemption_mode": "swap"},
}
Positions = list[dict[int, Logprob] | None]


def prompts() -> list[TokensPrompt]:
    return [
        TokensPrompt(
            prompt_token_ids=[(number * 37 + 11 * i + i * i) % (tiny.VOCAB_SIZE - 3) + 3 for i in range(length)]
        )
        for number, length in enumerate(LENGTHS)
    ]


def make_llm(folder: Path, **arguments: Any) -> LLM:
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "max_num_seqs": 8, **POOL}
    return LLM(str(folder), **(settings | arguments))


def prompt_logprobs(llm: LLM, chosen: list[TokensPrompt], *params: SamplingParams) -> list[Positions | None]:
    given = list(params) if len(params) == len(chosen) else [params[0]] * len(chosen)
    return [output.prompt_logprobs for output in llm.generate(chosen, given, use_tqdm=False)]


def check(model: Any, token_ids: list[int], found: Positions | None) -> int:
    """Values, ranks and the most likely tokens of every position; returns how many ranks could be told exactly."""
    assert found is not None and found[0] is None and len(found) == len(token_ids)
    num_exact = 0
    with torch.inference_mode():
        rows = model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)
    for token_id, position, row in zip(token_ids[1:], found[1:], rows, strict=False):
        assert position is not None and next(iter(position)) == token_id
        for other, entry in position.items():
            assert entry.logprob == pytest.approx(float(row[other]), abs=MARGIN)
            highest, lowest = (1 + int((row > row[other] + m).sum()) for m in (MARGIN, -MARGIN))
            assert entry.rank is not None and highest <= entry.rank < lowest
            num_exact += other == token_id and highest + 1 == lowest
        ranks = sorted(entry.rank or 0 for entry in position.values())
        assert ranks[:NUM_TOP] == list(range(1, NUM_TOP + 1)) and len(ranks) <= NUM_TOP + 1
    return num_exact


def test_what_is_drawn_is_what_is_drawn_without_them(folder: Path) -> None:
    """The logits that the draws are from lie where those of the prompts are computed, too."""
    llm = make_llm(folder)
    tokens = []
    for number in (None, NUM_TOP):
        params = SamplingParams(
            **(WANTING | {"prompt_logprobs": number, "logprobs": 1, "n": 2, "temperature": 0.7, "seed": 5})
        )
        outputs = llm.generate(prompts(), params, use_tqdm=False)
        tokens.append([[(one.token_ids, one.logprobs) for one in output.outputs] for output in outputs])
    llm.shutdown()
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("variant", ["llama", "qwen3-tied-biases", "opt", "opt-350m"])
def test_they_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    model = tiny.make(variant, tmp_path)
    llm = make_llm(tmp_path)
    found = prompt_logprobs(llm, prompts(), SamplingParams(**WANTING))
    llm.shutdown()
    checked = [
        check(model, prompt["prompt_token_ids"], positions) for prompt, positions in zip(prompts(), found, strict=True)
    ]
    assert sum(checked) > 0.95 * sum(LENGTHS) - len(LENGTHS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.make("llama", folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Positions | None]:
    llm = make_llm(folder, enable_prefix_caching=False)
    found = [prompt_logprobs(llm, [prompt], SamplingParams(**WANTING))[0] for prompt in prompts()]
    llm.shutdown()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_they_are_the_same_bits_under_every_schedule(folder: Path, alone: list[Positions | None], name: str) -> None:
    """Twice, so that the prefix cache knows the prompts; beside requests that do not want them."""
    llm = make_llm(folder, **SCHEDULES[name])
    params = SamplingParams(**WANTING)
    neighbours = [TokensPrompt(prompt_token_ids=[5 + i] * 60) for i in range(3)]
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for _ in range(2):
        given = [plain] * 3 + [params] * len(LENGTHS)
        found = prompt_logprobs(llm, neighbours + prompts(), *given)
        assert found == [None] * 3 + alone
    stats = llm.stats()
    llm.shutdown()
    assert (stats.preemptions_total > 0) == ("num_gpu_blocks_override" in SCHEDULES[name])
    assert (stats.swapped_in_blocks_total > 0) == (name == "swapped")


def test_several_outputs_and_log_probabilities_of_their_own_change_nothing(
    folder: Path, alone: list[Positions | None]
) -> None:
    llm = make_llm(folder)
    for more in (
        {"n": 3, "temperature": 1.0, "seed": 1},
        {"n": 2, "best_of": 4, "temperature": 1.0, "seed": 1},
        {"logprobs": 1, "repetition_penalty": 1.5, "logit_bias": {7: 50.0}},
    ):
        assert prompt_logprobs(llm, prompts(), SamplingParams(**(WANTING | more))) == alone
    with_fewer = prompt_logprobs(llm, prompts(), SamplingParams(**(WANTING | {"prompt_logprobs": 0})))
    for fewer, positions in zip(with_fewer, alone, strict=True):
        assert fewer is not None and positions is not None
        assert fewer[1:] == [dict([next(iter(position.items()))]) for position in positions[1:] if position]
    llm.shutdown()


def test_a_prompt_whose_logits_are_not_finite_fails_alone(folder: Path, tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][13] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    llm = make_llm(tmp_path, max_num_batched_tokens=16)
    params = SamplingParams(**WANTING)
    bad = TokensPrompt(prompt_token_ids=[5, 13, *range(20, 60)])
    with pytest.raises(NonFiniteLogitsError):
        llm.generate([bad, prompts()[2]], params, use_tqdm=False)
    good = [prompt for prompt in prompts() if 13 not in prompt["prompt_token_ids"]]
    assert all(found is not None for found in prompt_logprobs(llm, good, params))
    llm.shutdown()


def test_more_than_max_logprobs_are_refused(folder: Path) -> None:
    llm = make_llm(folder, max_logprobs=7)
    with pytest.raises(RequestError, match=r"^prompt_logprobs must be in \[0, 7\] \(max_logprobs\), got 8$"):
        llm.generate(prompts(), SamplingParams(prompt_logprobs=8), use_tqdm=False)
    llm.shutdown()
