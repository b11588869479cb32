"""pagedcore as a measured engine: the synchronous engine, stepped.

Usage: python pagedcore_worker.py MODEL DTYPE THREADS
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.worker import Case, Times, serve
from pagedcore.build import load_engine
from pagedcore.config import EngineConfig
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams


class Pagedcore:
    def __init__(self, model: str, dtype: str, threads: int) -> None:
        self._loaded = load_engine(
            EngineConfig(
                model=model,
                dtype=dtype,
                num_threads=threads,
                max_model_len=2048,
                max_num_seqs=64,
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
            )
        )
        self._ids = itertools.count()

    def run(self, case: Case) -> Times:
        engine = self._loaded.engine
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=case.tokens + 1)
        waiting = set()
        begin = time.perf_counter()
        for prompt in case.prompts(self._loaded.vocab_size):
            request = Request(str(next(self._ids)), prompt, params)
            waiting.add(request.request_id)
            engine.add_request(request)
        early = 0  # tokens of decode steps that ran before the last prompt was done
        while waiting:
            for output in engine.step():
                if output.request_id in waiting:
                    waiting.discard(output.request_id)
                else:
                    early += len(output.token_ids)
        first = time.perf_counter()
        late = 0
        while engine.has_work():
            late += sum(len(output.token_ids) for output in engine.step())
        seconds = time.perf_counter() - first
        # A step that mixes decodes with prompts counts as prefill; decode time is scaled to all the case's tokens.
        return Times(first - begin, seconds * (early + late) / late)


if __name__ == "__main__":
    serve(Pagedcore(sys.argv[1], sys.argv[2], int(sys.argv[3])))
