"""What config.pbtxt says about serving: which instances on which devices, metrics, and how to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError
from pagedcore_triton.protocol import INPUTS, OUTPUTS, InputTensor, OutputTensor

DRAIN_SECONDS = 5.0
MAX_DRAIN_SECONDS = 3600.0


@dataclass(frozen=True)
class ServingConfig:
    """The settings of config.pbtxt that are this backend's to carry out.

    `reports_metrics`: REPORT_CUSTOM_METRICS, vllm_backend's switch. `gpu_device_id`: GPU_DEVICE_IDS, the GPU of a KIND_MODEL
    instance. `drain_seconds`: DRAIN_SECONDS, how long open requests may go on after a signal to the model's process.
    `num_instances`: 1, or the number of GPUs with an engine of their own.
    """

    reports_metrics: bool
    gpu_device_id: int | None
    drain_seconds: float
    num_instances: int

    @classmethod
    def from_model_config(cls, model_config: Mapping[str, Any]) -> ServingConfig:
        """`model_config`: Triton's, completed. Raises ConfigError for one under which the engine cannot serve."""
        if not model_config.get("model_transaction_policy", {}).get("decoupled", False):
            raise ConfigError("config.pbtxt: model_transaction_policy { decoupled: true } is required")
        _check_tensors(model_config)
        parameters = {name: value["string_value"] for name, value in model_config["parameters"].items()}
        return cls(
            reports_metrics=parameters.get("REPORT_CUSTOM_METRICS", "").lower() == "true",
            gpu_device_id=_gpu_device_id(parameters.get("GPU_DEVICE_IDS")),
            drain_seconds=_drain_seconds(parameters.get("DRAIN_SECONDS")),
            num_instances=_count_instances(model_config["instance_group"]),
        )

    def placed(self, config: EngineConfig, kind: str, device_id: int) -> EngineConfig:
        """`config` on the device that Triton gives an instance of a kind (GPU, CPU, MODEL).

        Raises ConfigError where that contradicts `config`.
        """
        if kind == "GPU":
            return _on(config, "cuda", device_id, "instance_group kind KIND_GPU")
        if kind == "CPU":
            return _on(config, "cpu", config.device_index, "instance_group kind KIND_CPU")
        if self.gpu_device_id is not None:
            return _on(config, "cuda", self.gpu_device_id, f"GPU_DEVICE_IDS {self.gpu_device_id}")
        return config


def _on(config: EngineConfig, device: str, index: int, source: str) -> EngineConfig:
    if config.device not in ("auto", device):
        raise ConfigError(f"config.pbtxt: {source} contradicts the device of model.json, {config.device!r}")
    return dataclasses.replace(config, device=device, device_index=index)


def _count_instances(groups: Sequence[Mapping[str, Any]]) -> int:
    """How many engines there are: one for all requests, or one on each of several GPUs."""
    placements = [
        (group["kind"], gpu) for group in groups for gpu in group["gpus"] or [None] for _ in range(group["count"])
    ]
    is_one_per_gpu = {kind for kind, _ in placements} == {"KIND_GPU"} and len(set(placements)) == len(placements)
    if len(placements) != 1 and not is_one_per_gpu:
        raise ConfigError(
            "config.pbtxt: instance_group must have 1 instance (one engine serves all requests), or one on each of several "
            f"GPUs (count: 1 kind: KIND_GPU), got {len(placements)}"
        )
    return len(placements)


def _gpu_device_id(given: str | None) -> int | None:
    if given is None or not given.strip():
        return None
    if not given.strip().isdecimal():
        raise ConfigError(
            f"config.pbtxt: GPU_DEVICE_IDS must be the number of one GPU (this version runs on one device), got {given!r}"
        )
    return int(given)


def _drain_seconds(given: str | None) -> float:
    if given is None:
        return DRAIN_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= MAX_DRAIN_SECONDS:
        raise ConfigError(
            f"config.pbtxt: DRAIN_SECONDS must be a number in [0, {MAX_DRAIN_SECONDS:.0f}], got {given!r}"
        )
    return seconds


def _check_tensors(model_config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the inputs and outputs are the ones that auto_complete_config adds."""
    tables: tuple[tuple[str, Sequence[InputTensor | OutputTensor]], ...] = (("input", INPUTS), ("output", OUTPUTS))
    for kind, rows in tables:
        given = {tensor["name"]: (tensor["data_type"], tuple(tensor["dims"])) for tensor in model_config[kind]}
        for row in rows:
            found = given.pop(row.name, None)
            if found != (row.data_type, row.dims):
                wanted = f"{row.data_type} and dims {list(row.dims)}, or be left out"
                raise ConfigError(f"config.pbtxt: {kind} {row.name} must have {wanted}, got {found}")
        if given:
            names = ", ".join(row.name for row in rows)
            raise ConfigError(f"config.pbtxt: {kind} must be one of {names}, got {next(iter(given))}")
