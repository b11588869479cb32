"""Record how the beams of a real model descend from each other, for figure 15: benchmarks/data/beam_parents.json.gz.

Usage: python benchmarks/paper/record_beams.py      (minutes on a CPU; fetches the default model)
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.paper.workloads import DATA
from benchmarks.report import ROOT
from pagedcore.serve.default_model import ensure_default_model

NUM_PROMPTS, NUM_STEPS, WIDTHS = 12, 320, (2, 4, 6)
OUT = DATA / "beam_parents.json.gz"


@torch.inference_mode()
def record(
    model: transformers.PreTrainedModel, prompts: torch.Tensor, mask: torch.Tensor, width: int
) -> list[list[int]]:
    """Plain beam search without an end: for each prompt, the parents of its `width` beams at every step, flattened.

    prompts, mask: [num_prompts, length] int64, padded on the left
    """
    count = prompts.shape[0]
    cache = transformers.DynamicCache()
    logits = model(prompts, attention_mask=mask, past_key_values=cache).logits[:, -1].float()
    scores, tokens = logits.log_softmax(-1).topk(width)  # [count, width]
    cache.batch_repeat_interleave(width)
    mask = mask.repeat_interleave(width, 0)
    rows = torch.arange(count)[:, None] * width
    parents: list[list[int]] = [[] for _ in range(count)]
    for _ in range(NUM_STEPS):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits = model(tokens.reshape(-1, 1), attention_mask=mask, past_key_values=cache).logits[:, -1].float()
        vocab_size = logits.shape[-1]
        totals = scores[..., None] + logits.log_softmax(-1).view(count, width, vocab_size)
        scores, best = totals.view(count, -1).topk(width)
        origin, tokens = best // vocab_size, best % vocab_size
        cache.reorder_cache((rows + origin).reshape(-1))
        for prompt, beams in enumerate(origin.tolist()):
            parents[prompt] += beams
    return parents


def main() -> None:
    folder = ensure_default_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    lines = (ROOT / "tests" / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)}], tokenize=False, add_generation_prompt=True
        )
        for line in lines[:NUM_PROMPTS]
    ]
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    record_of = {}
    for width in WIDTHS:
        record_of[str(width)] = record(model, encoded.input_ids, encoded.attention_mask, width)
        print(f"beam width {width}: {NUM_PROMPTS} prompts, {NUM_STEPS} steps")
    with OUT.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
        stream.write(json.dumps(record_of, separators=(",", ":")).encode())


if __name__ == "__main__":
    main()
