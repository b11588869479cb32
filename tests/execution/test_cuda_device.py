"""The GPU as a device: what its memory goes to, which one it is, and what comes of its failing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedcore import LLM
from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError
from pagedcore.execution.kv_cache import GRAPH_BYTES, MemoryPlan, plan_gpu_memory
from tests.execution.cuda_cases import SHAPE
from tests.models import tiny


def test_a_gpu_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    with pytest.raises(ConfigError, match=r"device must be auto or cpu here, got 'cuda'"):
        LLM(str(tmp_path), device="cuda", skip_tokenizer_init=True)


def _plan(draws: int = 0, **arguments: Any) -> MemoryPlan:
    config = EngineConfig(model="x", **arguments)
    parts = {
        "weights": 50_000,
        "activations": 5_000,
        "inputs": 1_000,
        "workspace": 4_000,
        "draws": draws,
        "swap_space": 0,
        "block": 1_000,
    }
    return plan_gpu_memory(config, **parts, max_model_len=64, used_bytes=100_000, total_bytes=GRAPH_BYTES + 1_000_000)


def test_a_gpu_is_filled_to_the_share_asked_for() -> None:
    plan = _plan(gpu_memory_utilization=1.0)
    assert (plan.num_blocks, plan.other, plan.kv_cache) == (900, 40_000, 900_000)
    assert _plan(kv_cache_memory_bytes=7_999).num_blocks == 7
    assert _plan(gpu_memory_utilization=1.0, max_num_seqs=2).num_blocks == 8, "no more than can be filled"
    with_draws = _plan(draws=3_000, gpu_memory_utilization=1.0)  # which are in use already
    assert (with_draws.num_blocks, with_draws.draws, with_draws.other) == (900, 3_000, 37_000)
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes asks for a KV cache"):
        _plan(kv_cache_memory_bytes=901_000)
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization must leave room for a KV cache: 0.1 of 0.3 GiB is"):
        _plan(gpu_memory_utilization=0.1)


_ON_DEVICE = """
import subprocess, sys, threading
from pagedcore.build import build_engine
from pagedcore.config import EngineConfig
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
folder, index = sys.argv[1], int(sys.argv[2])

def used():
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()]

class Sink:
    def __init__(self):
        self.tokens, self.ended = [], threading.Event()
    def push(self, output):
        assert output.error is None, output.error
        self.tokens += output.token_ids
        if output.request_finished:
            self.ended.set()

before = used()
loaded = build_engine(EngineConfig(
    model=folder, device="cuda", device_index=index, dtype="float16", skip_tokenizer_init=True, max_num_seqs=8,
    max_model_len=128, kv_cache_memory_bytes=1 << 26, max_num_batched_tokens=4096))
sinks = [Sink() for _ in range(8)]
for number, sink in enumerate(sinks):
    extra = {"logprobs": 2, "presence_penalty": 0.3} if number % 2 else {}
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, **extra)
    loaded.engine.submit(Request(str(number), [5 + number] * 70, params), sink)
for sink in sinks:
    assert sink.ended.wait(60)
grown = [now - then for now, then in zip(used(), before)]
loaded.shutdown()
print("grown", *(other for i, other in enumerate(grown) if i != index))
print("tokens", *(token for sink in sinks for token in sink.tokens))
"""


@pytest.mark.gpu
def test_the_engine_runs_on_the_device_that_it_is_given(tmp_path: Path) -> None:
    """With its threads, in a process of its own, as in a server: captured steps and draws with extras. All devices draw the same,
    and no other device holds as much as a context takes."""
    tiny.make("llama", tmp_path, **SHAPE, initializer_range=0.4)
    told = set()
    for index in range(torch.cuda.device_count()):
        command = [sys.executable, "-c", _ON_DEVICE, str(tmp_path), str(index)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert result.returncode == 0, result.stderr
        grown, tokens = result.stdout.splitlines()[-2:]
        assert all(int(other) < 100 for other in grown.split()[1:]), grown  # MiB
        told.add(tokens)
    assert len(told) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("changed", [{}, {"batch_invariant": True}, {"enforce_eager": True}])
def test_the_memory_plan_adds_up_and_nothing_is_allocated_later(changed: dict[str, bool], tmp_path: Path) -> None:
    tiny.make("llama", tmp_path, **SHAPE)
    command = [sys.executable, "-m", "tests.execution.allocations", str(tmp_path), json.dumps(changed)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr


_FAILING = """
import sys, torch
from pagedcore import LLM, SamplingParams
from pagedcore.errors import EngineDeadError
llm = LLM(sys.argv[1], device="cuda", skip_tokenizer_init=True, max_num_seqs=8, kv_cache_memory_bytes=1 << 26)
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
torch.ones(1, device="cuda")[torch.tensor([5], device="cuda")]
try:
    torch.cuda.synchronize()
except torch.AcceleratorError:
    print("the device has failed")
try:
    llm.generate([{"prompt_token_ids": [5, 6, 7]}] * 3, params, use_tqdm=False)
except EngineDeadError as error:
    print(f"dead: {error}")
"""


@pytest.mark.gpu
def test_a_device_that_failed_ends_the_engine_at_the_next_step(tmp_path: Path) -> None:
    """In a process of its own, which no CUDA call can be made in afterwards."""
    tiny.make("llama", tmp_path, **SHAPE)
    command = [sys.executable, "-c", _FAILING, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "the device has failed" in result.stdout, result.stderr
    assert "dead: the GPU failed: " in result.stdout, result.stdout + result.stderr
