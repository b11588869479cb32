"""Models and requests of the tests of the engine on a GPU."""

from __future__ import annotations

import random
from typing import Any

from pagedcore import LLM, SamplingParams
from pagedcore.execution.cuda import CudaExecutor
from tests.models import tiny

# Head sizes that the GPU's attention is made for.
OPT_SHAPE: dict[str, Any] = {"num_attention_heads": 4, "hidden_size": 256}
SHAPE: dict[str, Any] = {"head_dim": 64, "num_attention_heads": 8, "hidden_size": 256, "intermediate_size": 512}


def executor_of(llm: LLM) -> CudaExecutor:
    executor = llm._loaded.engine._executor
    assert isinstance(executor, CudaExecutor)
    return executor


def random_prompts(count: int, seed: int = 0) -> list[Any]:
    rng = random.Random(seed)
    return [
        {"prompt_token_ids": [rng.randrange(3, tiny.VOCAB_SIZE) for _ in range(rng.randint(1, 90))]}
        for _ in range(count)
    ]


def generated(llm: LLM, prompts: list[Any], params: list[SamplingParams]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
