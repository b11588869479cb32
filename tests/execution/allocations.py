"""What an engine on a GPU allocates: `python -m tests.execution.allocations FOLDER ARGUMENTS`, engine arguments as JSON.

In a process of its own, as a server's is. In one that has had other engines, the thread that launches steps may be given another
cuBLAS handle than the one that the model was loaded with, and that gets a workspace of its own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from pagedcore import LLM, SamplingParams
from tests.execution.cuda_cases import executor_of, random_prompts

SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": 3, "presence_penalty": 0.5},
    {"logprobs": 20, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"logit_bias": {5: 1.5, 6: -100.0}, "allowed_token_ids": [*range(5, 100)]},
    {"prompt_logprobs": 5},
    {"min_tokens": 5, "stop_token_ids": [3, 4]},
    {"n": 3},
)


def check_plan(llm: LLM) -> None:
    """The parts of the memory plan add up to what the driver says is in use."""
    plan = executor_of(llm).memory
    assert 0 < plan.draws < 2**30
    parts = (
        plan.weights,
        plan.kv_cache,
        plan.activations,
        plan.inputs,
        plan.workspace,
        plan.draws,
        plan.graphs,
        plan.other,
    )
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    assert abs(sum(parts) - (total_bytes - free_bytes)) < 0.03 * total_bytes, (plan, total_bytes - free_bytes)


def check_requests(llm: LLM) -> None:
    """No request makes the engine allocate device memory or pinned memory."""
    before = (torch.cuda.memory_reserved(), torch.cuda.host_memory_stats()["num_host_alloc"])
    plain: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 20, "ignore_eos": True}
    for extra in SAMPLING:
        for number in (64, 3):
            llm.generate(random_prompts(number), SamplingParams(**plain, **extra), use_tqdm=False)
            after = (torch.cuda.memory_reserved(), torch.cuda.host_memory_stats()["num_host_alloc"])
            assert after == before, (extra, before, after)


def main() -> None:
    arguments = {"max_num_seqs": 64, "gpu_memory_utilization": 0.5, **json.loads(sys.argv[2])}
    llm = LLM(sys.argv[1], device="cuda", skip_tokenizer_init=True, **arguments)
    check_plan(llm)
    check_requests(llm)
    llm.shutdown()


if __name__ == "__main__":
    main()
