"""Hugging Face transformers as a measured engine: forward calls with its key/value cache, logits of last positions only.

Usage: python transformers_worker.py MODEL DTYPE THREADS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.worker import Case, Times, serve


class Transformers:
    def __init__(self, model: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def run(self, case: Case) -> Times:
        ids = torch.tensor(case.prompts(self._model.config.vocab_size))
        cache = DynamicCache(config=self._model.config)
        begin = time.perf_counter()
        ids = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        first = time.perf_counter()
        for _ in range(case.tokens):
            ids = self._model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return Times(first - begin, time.perf_counter() - first)


if __name__ == "__main__":
    serve(Transformers(sys.argv[1], sys.argv[2], int(sys.argv[3])))
