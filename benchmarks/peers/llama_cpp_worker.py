"""llama.cpp as a measured engine: llama_decode on batches of sequences, in an environment of its own.

Usage: python llama_cpp_worker.py GGUF THREADS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.worker import Case, Times, serve

BATCH_TOKENS = 2048


class LlamaCpp:
    def __init__(self, gguf: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._threads = threads
        self._model = llama_cpp.llama_model_load_from_file(gguf.encode(), llama_cpp.llama_model_default_params())
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def run(self, case: Case) -> Times:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = case.batch * (case.context + case.tokens + 1)
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH_TOKENS, 512, case.batch
        params.n_threads = params.n_threads_batch = self._threads
        context = llama_cpp.llama_init_from_model(self._model, params)
        batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        try:
            return self._timed(context, batch, case)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def _timed(self, context: object, batch: llama_cpp.llama_batch, case: Case) -> Times:
        prompts = case.prompts(self._vocab_size)
        ids = [0] * case.batch
        begin = time.perf_counter()
        entries = [
            (prompt[position], position, seq, position == case.context - 1)
            for seq, prompt in enumerate(prompts)
            for position in range(case.context)
        ]
        for at in range(0, len(entries), BATCH_TOKENS):
            self._decode(context, batch, entries[at : at + BATCH_TOKENS], ids)
        first = time.perf_counter()
        for step in range(case.tokens):
            entries = [(ids[seq], case.context + step, seq, True) for seq in range(case.batch)]
            self._decode(context, batch, entries, ids)
        return Times(first - begin, time.perf_counter() - first)

    def _decode(
        self, context: object, batch: llama_cpp.llama_batch, entries: list[tuple[int, int, int, bool]], ids: list[int]
    ) -> None:
        batch.n_tokens = len(entries)
        for i, (token, position, seq, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = seq
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        for i, (_, _, seq, wanted) in enumerate(entries):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(context, i)
                ids[seq] = _argmax(logits, self._vocab_size)


def _argmax(logits: object, size: int) -> int:
    return int(np.ctypeslib.as_array(logits, shape=(size,)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp(sys.argv[1], int(sys.argv[2])))
