"""With `batch_invariant`, log probabilities on a GPU are the same bits alone, batched, chunked, cached, recomputed, swapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.exactness import schedules
from tests.exactness.schedules import SCHEDULES, Positions, Schedule
from tests.models import tiny

pytestmark = pytest.mark.gpu

LARGE: dict[str, Any] = {
    "vocab_size": 40_960,
    "max_position_embeddings": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 4,
}
# Groups of four query heads; norms behind, projections around the embeddings, biases.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": (
        "bfloat16",
        LARGE | {"intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    ),
    "opt-350m": ("float16", LARGE | {"ffn_dim": 1024, "num_attention_heads": 2}),
}


@pytest.fixture(scope="module", params=MODELS)
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def model(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(variant)
    tiny.make(variant, folder, **MODELS[variant][1])
    return folder


@pytest.fixture(scope="module")
def alone(variant: str, model: Path) -> Positions:
    return schedules.alone(MODELS[variant][0], model, device="cuda")


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.on_gpu], ids=lambda schedule: schedule.name)
def test_same_bits_under_every_schedule(variant: str, model: Path, alone: Positions, schedule: Schedule) -> None:
    results = schedules.under(schedule, MODELS[variant][0], model, device="cuda")
    assert schedules.num_different(results, alone) == 0


def test_without_the_mode_bits_depend_on_the_batch(variant: str, model: Path) -> None:
    """The inverse control."""
    arguments: dict[str, Any] = {"device": "cuda", "batch_invariant": False}
    dtype = MODELS[variant][0]
    results = schedules.under(Schedule("batched"), dtype, model, **arguments)
    assert schedules.num_different(results, schedules.alone(dtype, model, **arguments)) > 0
