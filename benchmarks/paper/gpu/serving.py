"""One model on a device, engines of any memory policy that take turns on it, and traces served in real time."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.paper.beam_replay import BeamParents, with_recorded_beams
from benchmarks.paper.workloads import MAX_MODEL_LEN, TraceRequest
from pagedcore.config import EngineConfig
from pagedcore.engine.engine import Engine, EngineLimits
from pagedcore.engine.executor import Executor, PendingStep
from pagedcore.engine.memory_policy import MemoryPolicy
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.step_plan import Int32Array, StepPlan, StepResult
from pagedcore.engine.swap_space import PreemptionMode
from pagedcore.execution.cuda import CudaExecutor
from pagedcore.execution.local import LocalExecutor
from pagedcore.models.config import ModelConfig

_OPT = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "torch_dtype": "bfloat16", "eos_token_id": 2}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "eos_token_id": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "opt13b": _OPT
    | {
        "vocab_size": 50272,
        "hidden_size": 5120,
        "ffn_dim": 20480,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 2048,
    },
    "llama13b": _LLAMA
    | {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    "tiny": _OPT
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 2048,
    },
}
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 512, 2048


@dataclass(frozen=True)
class EngineSetup:
    """What differs between engines on one model. `num_slots`: of the K/V pool, None: all the model was loaded with."""

    policy: str
    num_slots: int | None = None
    enable_prefix_caching: bool = False
    preemption_mode: PreemptionMode = PreemptionMode.AUTO


@dataclass(frozen=True)
class Live:
    """What serving a trace in real time came to.

    normalized_latency: mean over requests of (seconds from arrival to end) / (output length), in s/token; a request that had
    not ended when the run did counts with the time until then, so that the mean is a lower bound where there are such.
    output_tokens_per_second, batched (running requests a step): between a third of the trace and its end.
    """

    normalized_latency: float
    output_tokens_per_second: float
    batched: float
    num_requests: int
    num_unfinished: int
    preemptions: int


def free_memory() -> None:
    """Let go of device memory that no object has any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Server:
    """A model with random weights of a published shape, and the executor that runs it."""

    def __init__(
        self, shape: str, device: str, *, block_size: int = 16, num_slots: int | None = None, swap_space: float = 0.0
    ) -> None:
        """`num_slots`: of the K/V pool; None: what fits. `swap_space`: GiB of host memory."""
        self.shape = shape
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
        self._model = ModelConfig.from_folder(folder)
        config = EngineConfig(
            model=str(folder),
            device=device,
            load_format="dummy",
            max_model_len=MAX_MODEL_LEN,
            block_size=block_size,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            num_gpu_blocks_override=None if num_slots is None else -(-num_slots // block_size),
            swap_space=swap_space,
        )
        executor_class = CudaExecutor if device == "cuda" else LocalExecutor
        self.executor: CudaExecutor | LocalExecutor = executor_class(
            config, self._model, folder, MAX_MODEL_LEN, MAX_NUM_BATCHED_TOKENS
        )

    @property
    def num_slots(self) -> int:
        shape = self.executor.kv_cache_shape
        return shape.num_blocks * shape.block_size

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def engine(self, setup: EngineSetup, executor: Executor | None = None) -> Engine:
        """A fresh engine; the one before it must have ended its requests, or is not used any more."""
        shape = self.executor.kv_cache_shape
        policy = MemoryPolicy(setup.policy, MAX_MODEL_LEN)
        num_blocks = shape.num_blocks if setup.num_slots is None else setup.num_slots // shape.block_size
        blocks = policy.make_blocks(
            min(num_blocks, shape.num_blocks),
            shape.block_size,
            num_host_blocks=shape.num_host_blocks,
            enable_prefix_caching=setup.enable_prefix_caching,
        )
        config = SchedulerConfig(
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            enable_prefix_caching=setup.enable_prefix_caching,
            step_sizes=self.executor.step_sizes,
            preemption_mode=setup.preemption_mode,
            swap_cost_tokens=shape.swap_cost_tokens,
        )
        scheduler = Scheduler(config, blocks, self.executor.step_buffers(), policy)
        limits = EngineLimits(MAX_MODEL_LEN, self.vocab_size, 0, frozenset(self._model.eos_token_ids))
        return Engine(scheduler, executor or self.executor, limits)

    def shutdown(self) -> None:
        """Give the memory of the device back, so that another model fits; the server is of no use after that."""
        self.executor.shutdown()
        del self.executor
        free_memory()
        self._folder.cleanup()


class _PendingReplay:
    def __init__(self, pending: PendingStep, plan: StepPlan, parents: BeamParents) -> None:
        self._pending, self._plan, self._parents = pending, plan, parents

    def wait(self) -> StepResult:
        return with_recorded_beams(self._plan, self._pending.wait(), self._parents)


class ReplayExecutor:
    """Runs every step on a real executor; which beams go on is what was recorded of a real model, for these have random weights."""

    def __init__(self, executor: Executor, parents: BeamParents) -> None:
        self.kv_cache_shape = executor.kv_cache_shape
        self.step_sizes = executor.step_sizes
        self._executor, self._parents = executor, parents

    def step_buffers(self) -> list[Int32Array]:
        return self._executor.step_buffers()

    def launch(self, plan: StepPlan) -> PendingStep:
        pending = self._executor.launch(plan)
        return _PendingReplay(pending, plan, self._parents) if plan.beam_rows else pending

    def shutdown(self) -> None:
        self._executor.shutdown()


class _Open:
    """A request of the trace that has not ended; its samples are parts of one engine request, or are engine requests."""

    def __init__(self, request: TraceRequest) -> None:
        self.request = request
        self.num_left = request.num_samples


class LiveRun:
    """Serves one trace to its end and a little beyond, on the wall's clock."""

    def __init__(self, server: Server, setup: EngineSetup, trace: list[TraceRequest], seconds: float) -> None:
        self._trace, self._seconds = trace, seconds
        self._is_paged = setup.policy == "paged"
        self._parents = {
            f"{number}.0": request.beam_parents
            for number, request in enumerate(trace)
            if self._is_paged and request.beam_parents is not None
        }
        self._engine = server.engine(setup, ReplayExecutor(server.executor, self._parents) if self._parents else None)
        self._vocab_size = server.vocab_size
        self._open: dict[str, _Open] = {}
        self.num_tokens: dict[tuple[str, int], int] = {}
        self._latencies: list[float] = []
        self._num_arrived = self._num_output_tokens = self._num_steps = self._num_running = 0

    def run(self) -> Live:
        """Requests arrive in the first `seconds`; a quarter of that later, what has not ended is given up."""
        engine, trace = self._engine, self._trace
        begin = time.perf_counter()
        now = 0.0
        while (self._num_arrived < len(trace) or engine.has_work()) and now < 1.25 * self._seconds:
            while self._num_arrived < len(trace) and trace[self._num_arrived].arrival <= now:
                self._add(trace[self._num_arrived])
            if engine.has_work():
                self._step(begin)
            else:
                time.sleep(max(trace[self._num_arrived].arrival - now, 0.0))
            now = time.perf_counter() - begin
        return self._result(now)

    def _add(self, request: TraceRequest) -> None:
        number, self._num_arrived = self._num_arrived, self._num_arrived + 1
        prompt = [token % self._vocab_size for token in request.prompt]
        width = request.num_samples
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        num_requests = width
        if self._is_paged and request.beam_parents is not None:
            params = SamplingParams(temperature=0, beam_width=width, max_tokens=request.output_len, ignore_eos=True)
            num_requests = 1
        elif self._is_paged and width > 1:
            params = SamplingParams(n=width, seed=number, max_tokens=None, ignore_eos=True)
            num_requests = 1
        entry = _Open(request)
        if params.use_beam_search:
            entry.num_left = 1
        for part in range(num_requests):
            name = f"{number}.{part}"
            self._open[name] = entry
            self._engine.add_request(Request(name, prompt, params, expected_output_len=request.output_len))

    def _step(self, begin: float) -> None:
        outputs = self._engine.step()
        now = time.perf_counter() - begin
        in_window = self._seconds / 3 <= now < self._seconds
        if in_window:
            self._num_steps += 1
            self._num_running += len(self._engine.scheduler.running)
        for output in outputs:
            if output.error is not None:
                raise output.error
            entry = self._open[output.request_id]
            request = entry.request
            if entry.request.beam_parents is not None and self._is_paged:
                num_new = request.output_len * request.num_samples  # all are told at the end
                ends = output.request_finished
            else:
                key = output.request_id, output.index
                before = self.num_tokens.get(key, 0)
                num_new = min(len(output.token_ids), request.output_len - before)
                self.num_tokens[key] = before + num_new
                ends = num_new > 0 and before + num_new == request.output_len
                if ends and output.finish_reason is None:
                    self._engine.end_sequence(output.request_id, output.index)
            self._num_output_tokens += num_new * in_window
            if ends:
                entry.num_left -= 1
                if entry.num_left == 0:
                    self._latencies.append((now - request.arrival) / request.output_len)
                    del self._open[output.request_id]

    def _result(self, now: float) -> Live:
        left = list(dict.fromkeys(entry for entry in self._open.values() if entry.num_left))
        latencies = [*self._latencies, *((now - entry.request.arrival) / entry.request.output_len for entry in left)]
        for name in list(self._open):
            self._engine.abort(name)
        while self._engine.has_work():
            self._engine.step()  # the step that is still running
        window = min(now, self._seconds) - self._seconds / 3
        return Live(
            normalized_latency=float(np.mean(latencies)),
            output_tokens_per_second=self._num_output_tokens / max(window, 1e-9),
            batched=self._num_running / max(self._num_steps, 1),
            num_requests=self._num_arrived,
            num_unfinished=len(left),
            preemptions=self._engine.stats().preemptions_total,
        )
