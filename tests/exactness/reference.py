"""What transformers generates greedily in float32, kept as data; run as a program, it makes that data anew.

Usage: python -m tests.exactness.reference MT_BENCH HUMAN_EVAL

MT_BENCH, HUMAN_EVAL: the files that tests/data/README.md names.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from pagedcore.serve.default_model import ensure_default_model

PATH = Path(__file__).parents[1] / "data" / "greedy_smollm2.jsonl.gz"
NUM_MT_BENCH, NUM_HUMAN_EVAL = 80, 120
NUM_TOKENS = 128
BATCH = 50
TIE = 1e-4  # two logits this close may change places by rounding alone


@dataclass(frozen=True)
class Continuation:
    """A prompt and its greedy continuation. `close`: the output positions whose two best logits are less than TIE apart."""

    source: str
    prompt: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    close: list[int]


def load() -> list[Continuation]:
    """All of them, as transformers generated them."""
    lines = gzip.decompress(PATH.read_bytes()).decode().splitlines()
    return [Continuation(**json.loads(line)) for line in lines]


@dataclass(frozen=True)
class Agreement:
    """How far an output is the reference's: `num_equal` tokens, then the end or a tie, or, if not `excused`, neither."""

    num_equal: int
    excused: bool


def compare(reference: Continuation, token_ids: Sequence[int]) -> Agreement:
    """Up to the first token that differs: behind it the two continue different texts."""
    expected = reference.token_ids[: len(token_ids)]
    differing = [i for i, (ours, theirs) in enumerate(zip(token_ids, expected, strict=True)) if ours != theirs]
    return Agreement(differing[0] if differing else len(token_ids), not differing or differing[0] in reference.close)


def _prompts(mt_bench: Path, human_eval: Path) -> list[tuple[str, str]]:
    questions = [json.loads(line) for line in mt_bench.read_text(encoding="utf-8").splitlines()]
    problems = [json.loads(line) for line in gzip.decompress(human_eval.read_bytes()).decode().splitlines()]
    return [
        *((f"MT-bench {question['question_id']}", question["turns"][0]) for question in questions[:NUM_MT_BENCH]),
        *((problem["task_id"], problem["prompt"]) for problem in problems[:NUM_HUMAN_EVAL]),
    ]


@torch.inference_mode()
def _generate(
    model: transformers.PreTrainedModel, prompts: Sequence[list[int]], num_tokens: int = NUM_TOKENS
) -> list[list[int]]:
    """Greedy continuations of a batch, padded on the left, whatever ends a text."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    output = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    tokens: list[list[int]] = output[:, width:].tolist()
    return tokens


@torch.inference_mode()
def _close(model: transformers.PreTrainedModel, prompt: list[int], output: list[int]) -> list[int]:
    """The positions of ties, by computing the whole text by itself, without padding; checks that `output` is greedy."""
    logits = model(torch.tensor([prompt + output[:-1]]), logits_to_keep=len(output)).logits[0]
    best = logits.topk(2).values
    gap = best[:, 0] - best[:, 1]
    differs = logits.argmax(dim=1) != torch.tensor(output)
    if (differs & (gap >= TIE)).any():
        raise RuntimeError("transformers disagrees with itself on a token that is no tie")
    positions: list[int] = (gap < TIE).nonzero().flatten().tolist()
    return positions


def main() -> int:
    folder = ensure_default_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = _prompts(Path(sys.argv[1]), Path(sys.argv[2]))
    ids = [tokenizer(text).input_ids for _, text in texts]
    results: dict[int, Continuation] = {}
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
    for begin in range(0, len(ids), BATCH):
        batch = by_length[begin : begin + BATCH]
        for i, output in zip(batch, _generate(model, [ids[i] for i in batch]), strict=True):
            results[i] = Continuation(*texts[i], ids[i], output, _close(model, ids[i], output))
        print(f"{len(results)} of {len(ids)}", flush=True)
    lines = "".join(json.dumps(asdict(results[i]), ensure_ascii=False) + "\n" for i in range(len(ids)))
    PATH.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
