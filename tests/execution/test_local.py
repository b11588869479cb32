"""LocalExecutor: steps launched one ahead give the tokens transformers gives; what fails fails alone."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore._core import BlockManager
from pagedcore.config import EngineConfig
from pagedcore.engine.step_plan import StepPlan, StepResult
from pagedcore.errors import ConfigError
from pagedcore.execution.local import LocalExecutor, LocalPendingStep, cpu_dtype
from pagedcore.models.config import ModelConfig
from tests.models import tiny
from tests.reference.paged import Row, fill_buffer

PROMPTS = [[7, 8, 9], [100, 2, 3, 4, 5, 60, 17, 18, 19, 20, 21], [50], [1, 2] * 12]
MAX_MODEL_LEN = 64


class Driver:
    """Plans greedy steps by hand on an executor."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        config = EngineConfig(
            model=str(folder), dtype="float32", block_size=4, max_num_seqs=8, num_gpu_blocks_override=128, **arguments
        )
        self.executor = LocalExecutor(config, ModelConfig.from_folder(folder), folder, MAX_MODEL_LEN, 64)
        shape = self.executor.kv_cache_shape
        self.blocks = BlockManager(shape.num_blocks, shape.block_size, enable_prefix_caching=False)
        self.num_steps = 0

    def add(self, seq_id: int, prompt: list[int]) -> Row:
        self.blocks.add(seq_id)
        return Row(seq_id, array("i", prompt))

    def launch(self, rows: list[Row], query_lens: list[int]) -> LocalPendingStep:
        packed = fill_buffer(self.blocks, rows, query_lens)
        buffer = self.executor.step_buffers()[self.num_steps % 3]
        buffer[: len(packed)] = packed
        self.num_steps += 1
        for i, row in enumerate(rows):
            row.last_row = i
        return self.executor.launch(StepPlan(self.num_steps, [], [], [], [], buffer, len(packed)))


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return tiny.make("llama", tmp_path)


@pytest.fixture
def driver(model: Any, tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(tmp_path)
    yield driver
    driver.executor.shutdown()


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers continues the prompt with."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def generate_one_ahead(driver: Driver, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Each step is launched before the one before has been waited for; the rows change places every time."""
    rows = [driver.add(i, prompt) for i, prompt in enumerate(prompts)]
    outputs: list[list[int]] = [[] for _ in rows]
    order = list(rows)
    pending = [(order, driver.launch(order, [len(row.token_ids) for row in order]))]
    for step in range(1, num_tokens):
        order = order[1:] + order[:1]
        pending.append((order, driver.launch(order, [1] * len(order))))
        _collect(*pending.pop(0), outputs)
        assert len(pending) == 1, step
    _collect(*pending.pop(0), outputs)
    for row in rows:
        driver.blocks.release(row.seq_id)
    return outputs


def _collect(order: list[Row], step: LocalPendingStep, outputs: list[list[int]]) -> None:
    for row, token in zip(order, step.wait().token_ids.tolist(), strict=True):
        row.token_ids.append(token)
        outputs[row.seq_id].append(token)


def test_steps_launched_one_ahead_continue_as_transformers_does(model: Any, driver: Driver) -> None:
    assert generate_one_ahead(driver, PROMPTS, 20) == [greedy(model, prompt, 20) for prompt in PROMPTS]


@pytest.mark.usefixtures("model")
def test_graphs_change_nothing(driver: Driver, tmp_path: Path) -> None:
    eager = Driver(tmp_path, enforce_eager=True)
    for count in (4, 2, 3, 4):
        prompts = PROMPTS[:count]
        assert generate_one_ahead(driver, prompts, 12) == generate_one_ahead(eager, prompts, 12)
    eager.executor.shutdown()


def test_forked_sequences_part_at_a_copied_block(model: Any, driver: Driver) -> None:
    prompt = PROMPTS[1]
    parent = driver.add(0, prompt)
    driver.launch([parent], [len(prompt) - 1]).wait()
    driver.blocks.fork(0, 1)
    child = Row(1, array("i", [*prompt[:-1], 99]), parent.num_computed)
    tokens = driver.launch([parent, child], [1, 1]).wait().token_ids.tolist()
    assert driver.blocks.block_table(0) != driver.blocks.block_table(1)
    assert tokens == [greedy(model, prompt, 1)[0], greedy(model, [*prompt[:-1], 99], 1)[0]]
    following = driver.launch([parent, child], [1, 1]).wait().token_ids.tolist()
    assert following == [greedy(model, prompt, 2)[1], greedy(model, [*prompt[:-1], 99], 2)[1]]


def test_row_that_is_not_finite_fails_alone_and_its_next_step_hurts_nobody(model: Any, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][13] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    driver = Driver(tmp_path)
    rows = [driver.add(0, PROMPTS[0]), driver.add(1, [5, 13, 5])]
    first = driver.launch(rows, [3, 3])
    second = driver.launch(rows, [1, 1])
    expected = greedy(model, PROMPTS[0], 2)
    assert first.wait().token_ids.tolist() == [expected[0], -1]
    assert second.wait().token_ids.tolist() == [expected[1], -1]
    driver.executor.shutdown()


def test_step_that_raises_says_so_and_the_next_one_runs(model: Any, driver: Driver) -> None:
    bad, good = driver.add(0, [tiny.VOCAB_SIZE]), driver.add(1, PROMPTS[0])
    failed, fine = driver.launch([bad], [1]), driver.launch([good], [3])
    with pytest.raises(IndexError):
        failed.wait()
    assert fine.wait().token_ids.tolist() == greedy(model, PROMPTS[0], 1)


@pytest.mark.usefixtures("model")
def test_shutdown_finishes_what_was_launched(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    step = driver.launch([driver.add(0, PROMPTS[0])], [3])
    driver.executor.shutdown()
    assert isinstance(step.wait(), StepResult)
    assert "pagedcore-executor" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.usefixtures("model")
def test_step_buffers_hold_the_largest_step(driver: Driver) -> None:
    rows = [driver.add(i, [1] * MAX_MODEL_LEN) for i in range(8)]
    for row in rows:
        driver.launch([row], [MAX_MODEL_LEN - 8]).wait()
    result = driver.launch(rows, [8] * 8).wait()
    assert len(set(result.token_ids.tolist())) == 1
    assert len({id(buffer) for buffer in driver.executor.step_buffers()}) == 3
    assert all(buffer.dtype == np.int32 for buffer in driver.executor.step_buffers())


def test_activations_beyond_the_memory_are_refused_before_they_are_allocated(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens = 1000000000 and max_num_seqs = 8 need [\d,.]+ GiB"):
        config = EngineConfig(model=str(tmp_path), dtype="float32", max_num_seqs=8)
        LocalExecutor(config, ModelConfig.from_folder(tmp_path), tmp_path, MAX_MODEL_LEN, 1_000_000_000)


def test_dtype_on_a_cpu() -> None:
    assert cpu_dtype("auto", "bfloat16") is torch.bfloat16
    assert cpu_dtype("auto", "float32") is torch.float32
    assert cpu_dtype("auto", "float16") is torch.bfloat16
    assert cpu_dtype("float32", "float16") is torch.float32
    with pytest.raises(ConfigError, match=r"dtype must be one of auto, float32, bfloat16 on a CPU, got 'float16'"):
        cpu_dtype("float16", "float16")
