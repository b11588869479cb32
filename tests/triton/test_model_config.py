"""What config.pbtxt may say about instances, devices and parameters."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pagedcore_triton.model_config import ServingConfig
from pagedcore_triton.protocol import INPUTS, OUTPUTS

from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError


def config_of(*groups: tuple[str, int, list[int]], **parameters: str) -> dict[str, Any]:
    """Triton's completed configuration, with groups of (kind, count, gpus)."""
    return {
        "model_transaction_policy": {"decoupled": True},
        "input": [{"name": row.name, "data_type": row.data_type, "dims": list(row.dims)} for row in INPUTS],
        "output": [{"name": row.name, "data_type": row.data_type, "dims": list(row.dims)} for row in OUTPUTS],
        "instance_group": [{"kind": kind, "count": count, "gpus": gpus} for kind, count, gpus in groups],
        "parameters": {name: {"string_value": value} for name, value in parameters.items()},
    }


@pytest.mark.parametrize(
    ("groups", "number"),
    [
        ([("KIND_MODEL", 1, [])], 1),
        ([("KIND_CPU", 1, [])], 1),
        ([("KIND_GPU", 1, [3])], 1),
        ([("KIND_GPU", 1, [0, 1])], 2),
        ([("KIND_GPU", 1, [0]), ("KIND_GPU", 1, [2])], 2),
    ],
)
def test_one_engine_or_one_on_each_gpu(groups: list[tuple[str, int, list[int]]], number: int) -> None:
    assert ServingConfig.from_model_config(config_of(*groups)).num_instances == number


@pytest.mark.parametrize(
    ("groups", "number"),
    [
        ([("KIND_MODEL", 2, [])], 2),
        ([("KIND_GPU", 2, [0])], 2),
        ([("KIND_GPU", 2, [0, 1])], 4),
        ([("KIND_GPU", 1, [0]), ("KIND_GPU", 1, [0])], 2),
        ([("KIND_GPU", 1, [0]), ("KIND_CPU", 1, [])], 2),
    ],
)
def test_engines_that_would_share_a_device_are_refused(groups: list[tuple[str, int, list[int]]], number: int) -> None:
    with pytest.raises(ConfigError, match=rf"instance_group must have 1 instance .*, got {number}$"):
        ServingConfig.from_model_config(config_of(*groups))


@pytest.mark.parametrize(
    ("kind", "gpu_ids", "asked", "device", "index"),
    [
        ("MODEL", "", "auto", "auto", 0),
        ("MODEL", "", "cpu", "cpu", 0),
        ("MODEL", " 2 ", "auto", "cuda", 2),
        ("MODEL", "2", "cuda", "cuda", 2),
        ("GPU", "2", "auto", "cuda", 1),
        ("CPU", "", "auto", "cpu", 0),
    ],
)
def test_the_engine_runs_where_triton_wants_it(kind: str, gpu_ids: str, asked: str, device: str, index: int) -> None:
    serving = ServingConfig.from_model_config(config_of(("KIND_MODEL", 1, []), GPU_DEVICE_IDS=gpu_ids))
    placed = serving.placed(EngineConfig("m", device=asked), kind, 1)
    assert (placed.device, placed.device_index) == (device, index)


@pytest.mark.parametrize(("kind", "gpu_ids", "asked"), [("GPU", "", "cpu"), ("CPU", "", "cuda"), ("MODEL", "1", "cpu")])
def test_contradictions_are_named(kind: str, gpu_ids: str, asked: str) -> None:
    serving = ServingConfig.from_model_config(config_of(("KIND_MODEL", 1, []), GPU_DEVICE_IDS=gpu_ids))
    with pytest.raises(ConfigError, match=f"(KIND_{kind}|GPU_DEVICE_IDS 1) contradicts .* {asked!r}"):
        serving.placed(EngineConfig("m", device=asked), kind, 0)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("GPU_DEVICE_IDS", "0,1"),
        ("GPU_DEVICE_IDS", "-1"),
        ("DRAIN_SECONDS", "-1"),
        ("DRAIN_SECONDS", "nan"),
        ("DRAIN_SECONDS", "3601"),
        ("DRAIN_SECONDS", "soon"),
    ],
)
def test_parameters_out_of_range_are_named(parameter: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{parameter} must be .*, got {re.escape(repr(value))}"):
        ServingConfig.from_model_config(config_of(("KIND_MODEL", 1, []), **{parameter: value}))


def test_parameters_that_are_left_out_and_given() -> None:
    assert ServingConfig.from_model_config(config_of(("KIND_MODEL", 1, []))).drain_seconds == 5.0
    given = config_of(
        ("KIND_MODEL", 1, []), DRAIN_SECONDS="12.5", REPORT_CUSTOM_METRICS="True", ENABLE_VLLM_HEALTH_CHECK="true"
    )
    serving = ServingConfig.from_model_config(given)
    assert (serving.drain_seconds, serving.reports_metrics) == (12.5, True)
