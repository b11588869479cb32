"""How the KV cache is sized, and how much memory the host is found to have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError
from pagedcore.execution.kv_cache import (
    KVCache,
    MemoryPlan,
    block_bytes,
    free_host_memory,
    plan_memory,
    plan_swap_space,
)
from pagedcore.layers.linear import Placement
from pagedcore.models.config import ModelConfig

MODEL = ModelConfig.from_values(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
)
BLOCK = 1000


def plan(free_bytes: int = 100_000, max_model_len: int = 64, **arguments: Any) -> MemoryPlan:
    config = EngineConfig(model="m", block_size=16, max_num_seqs=8, **arguments)
    return plan_memory(
        config,
        weights=10_000,
        activations=4_000,
        inputs=1_000,
        block=BLOCK,
        max_model_len=max_model_len,
        free_bytes=free_bytes,
    )


def test_share_of_what_the_rest_leaves() -> None:
    # 100,000 - 15,000 = 85,000 bytes are left; 20 % of them hold 17 blocks.
    assert plan(gpu_memory_utilization=0.2).num_blocks == 17
    assert plan(gpu_memory_utilization=0.2).kv_cache == 17_000


def test_no_more_than_all_sequences_can_fill() -> None:
    assert plan(free_bytes=10**9).num_blocks == 8 * 4


def test_a_large_machine_is_not_filled_unless_asked_for() -> None:
    large = {"free_bytes": 64 << 30, "max_model_len": 1 << 24}
    assert plan(**large).kv_cache <= 4 << 30
    assert plan(**large).kv_cache > (4 << 30) - BLOCK
    assert plan(**large, kv_cache_memory_bytes=8 << 30).kv_cache > (8 << 30) - BLOCK
    # One sequence has to fit, whatever it takes.
    assert plan(free_bytes=1 << 40, max_model_len=1 << 27).num_blocks == (1 << 27) // 16


@pytest.mark.parametrize("arguments", [{"num_gpu_blocks_override": 86}, {"kv_cache_memory_bytes": 86_000}])
def test_more_than_is_free_is_refused(arguments: dict[str, int]) -> None:
    assert plan(**{name: value - value // 86 for name, value in arguments.items()}).num_blocks == 85
    with pytest.raises(ConfigError, match=f"{next(iter(arguments))} asks for a KV cache"):
        plan(**arguments)


def test_bytes_and_override_come_first() -> None:
    assert plan(kv_cache_memory_bytes=7_999).num_blocks == 7
    assert plan(kv_cache_memory_bytes=7_999, num_gpu_blocks_override=2).num_blocks == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kv_cache_memory_bytes": 3_999}, "kv_cache_memory_bytes leaves the KV cache 3 blocks of 16 tokens"),
        ({"free_bytes": 12_000}, "gpu_memory_utilization leaves the KV cache 0 blocks"),
        ({"free_bytes": 19_000}, "max_model_len = 64 tokens needs 4: lower max_model_len or give more memory"),
    ],
)
def test_too_little_for_one_sequence_is_refused_with_numbers(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        plan(**arguments)


def test_the_plan_prints_itself() -> None:
    text = str(MemoryPlan(weights=3 * 2**20, activations=2**20, inputs=0, block=2**19, num_blocks=2500, block_size=16))
    assert "weights 3 MiB, KV cache 1,250 MiB, activations 1 MiB" in text
    assert "2,500 blocks of 16 tokens hold 40,000 tokens" in text


def test_block_bytes_are_those_of_the_cache() -> None:
    placement = Placement(torch.bfloat16, torch.device("cpu"))
    cache = KVCache(MODEL, 5, 16, placement)
    assert cache.tensor.nbytes == 5 * block_bytes(MODEL, 16, placement)
    assert cache.tensor.shape == (3, 2, 5, 2, 16, 32)
    cache.tensor.zero_()
    cache.layers[1].v.fill_(1)
    assert cache.tensor[1, 1].all()
    assert cache.tensor.sum() == cache.tensor[1, 1].numel()


def write_host(folder: Path, cgroup: dict[str, str]) -> tuple[Path, Path]:
    (folder / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 8000 kB\n")
    for name, text in cgroup.items():
        (folder / name).write_text(text)
    return folder, folder


def test_host_memory_is_what_is_available(tmp_path: Path) -> None:
    assert free_host_memory(*write_host(tmp_path, {})) == 8000 * 1024
    assert free_host_memory(*write_host(tmp_path, {"memory.max": "max\n"})) == 8000 * 1024


def test_container_limit_counts_without_its_page_cache(tmp_path: Path) -> None:
    limits = {
        "memory.max": "5000000\n",
        "memory.current": "4500000\n",
        "memory.stat": "anon 100\ninactive_file 700000\nactive_file 300000\n",
    }
    assert free_host_memory(*write_host(tmp_path, limits)) == 1_500_000
    (tmp_path / "memory.current").write_text("7000000\n")
    assert free_host_memory(tmp_path, tmp_path) == 0


def test_limit_of_a_version_1_control_group_counts_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    limits = {
        "memory/memory.limit_in_bytes": "5000000\n",
        "memory/memory.usage_in_bytes": "4500000\n",
        "memory/memory.stat": "inactive_file 9\ntotal_inactive_file 700000\ntotal_active_file 300000\n",
    }
    assert free_host_memory(*write_host(tmp_path, limits)) == 1_500_000
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert free_host_memory(tmp_path, tmp_path) == 8000 * 1024


def test_this_machine_has_memory() -> None:
    assert 2**20 < free_host_memory() < 2**50


def test_only_the_paged_policy_gets_swap_space() -> None:
    def num_blocks(**arguments: Any) -> int:
        return plan_swap_space(EngineConfig(model="x", **arguments), block=2**20, free_bytes=2**40, default=4.0)

    assert num_blocks() == 4096
    assert num_blocks(swap_space=0.5) == 512
    assert num_blocks(kv_policy="orca_oracle") == 0


def test_swap_space_that_nobody_asked_for_shrinks_to_what_is_free() -> None:
    def num_blocks(swap_space: float | None) -> int:
        config = EngineConfig(model="x", swap_space=swap_space)
        return plan_swap_space(config, block=2**20, free_bytes=3 * 2**30, default=4.0)

    assert num_blocks(None) == 1536
    with pytest.raises(ConfigError, match=r"swap_space asks for 4.0 GiB; 3.0 GiB are free"):
        num_blocks(4.0)
