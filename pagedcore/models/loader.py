"""Fills a model's weights from a Hugging Face folder's safetensors files, strictly, or with random numbers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from pagedcore import ops
from pagedcore.errors import ConfigError
from pagedcore.layers.linear import Linear, Placement, WeightSlot
from pagedcore.models.causal_lm import CausalLM
from pagedcore.models.config import ModelConfig
from pagedcore.models.registry import MODELS

_PROGRESS_BYTES = 2**30  # loading less takes about a second: no progress bar
# Derived from the configuration, or a format's number: some old checkpoints store them all the same.
_IGNORED = re.compile(r"^(model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.decoder\.version)$")
_DUMMY_PERIOD = 1_048_573  # prime, so that no two rows of a matrix repeat each other
_DUMMY_STD = 0.02


def load_model(
    path: str | Path,
    config: ModelConfig,
    max_model_len: int,
    placement: Placement,
    load_format: str,
    seed: int,
) -> CausalLM:
    """Build the model and fill it: from safetensors, or with seeded random weights where load_format is "dummy".

    Raises:
        ConfigError: a file or tensor is missing, unknown, of another shape, truncated or broken; the text names it.
    """
    model = MODELS[config.architecture](config, max_model_len, placement)
    slots = dict(model.weight_slots())
    if load_format == "dummy":
        _fill_dummy(slots, seed)
    else:
        _fill_from_files(Path(path), slots, config)
    if config.tie_word_embeddings:
        _tie(model)
    slots.clear()  # the slots' views would keep the unpacked weights alive
    if placement.device.type == "cpu":
        pack_weights(model)
    return model


def check_weights(config: ModelConfig, max_model_len: int, placement: Placement, free_bytes: int) -> None:
    """Raise ConfigError if the model's weights need more than the `free_bytes` of their device."""
    without_memory = dataclasses.replace(placement, device=torch.device("meta"))
    needed = MODELS[config.architecture](config, max_model_len, without_memory).num_bytes
    if needed > free_bytes:
        raise ConfigError(
            f"model: its weights need {needed / 2**30:,.1f} GiB in {str(placement.dtype).removeprefix('torch.')}, and "
            f"{max(free_bytes, 0) / 2**30:,.1f} GiB are free: {(needed - free_bytes) / 2**30:,.1f} GiB too few"
        )


def pack_weights(model: nn.Module) -> None:
    """Lay every linear layer's weight out for the CPU kernels, one after the other."""
    arena = ops.WeightArena()
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack(arena)


def _tie(model: CausalLM) -> None:
    head = model.lm_head
    assert head.weight is not None
    start = head.group.rank * head.weight.shape[0]
    head.weight.copy_(model.embed_tokens.weight[start : start + head.weight.shape[0]])


def _fill_from_files(folder: Path, slots: dict[str, WeightSlot], config: ModelConfig) -> None:
    files = _weight_files(folder)
    missing = dict(slots)
    total = sum(file.stat().st_size for file in files)
    with tqdm(
        total=total, desc="Loading weights", unit="B", unit_scale=True, disable=total < _PROGRESS_BYTES
    ) as progress:
        for file in files:
            for name, num_bytes in _fill_from_file(file, missing, config):
                missing.pop(name, None)
                progress.update(num_bytes)
    if missing:
        raise ConfigError(f"{folder}: weights are missing: {_listed(missing)}")


def _fill_from_file(file: Path, missing: dict[str, WeightSlot], config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Copy each tensor of one file to its slot; yields slot names and sizes in bytes."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for stored_name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                name = _full_name(stored_name)
                slot = missing.get(name)
                if slot is not None:
                    yield name, _copy(tensors.get_slice(stored_name), slot, name, file)
                elif not _IGNORED.match(name) and not (name == "lm_head.weight" and config.tie_word_embeddings):
                    raise ConfigError(
                        f"{file}: tensor {stored_name} is not part of {config.architecture}, or is there twice"
                    )
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is truncated or not a safetensors file: {error}") from None


def _full_name(name: str) -> str:
    """A checkpoint of the decoder without its head (some of OPT's) leaves out the prefix."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _copy(tensor: object, slot: WeightSlot, name: str, file: Path) -> int:
    shape = tuple(tensor.get_shape())  # type: ignore[attr-defined]
    if shape != slot.full_shape:
        raise ConfigError(
            f"{file}: tensor {name} must have shape {list(slot.full_shape)} by config.json, has {list(shape)}"
        )
    if slot.destination is None:
        return 0
    part = [slice(None)] * len(shape)
    part[slot.dim] = slice(slot.start, slot.start + slot.destination.shape[slot.dim])
    values: torch.Tensor = tensor[tuple(part)]  # type: ignore[index]
    if not values.is_floating_point():
        raise ConfigError(f"{file}: tensor {name} must hold floating-point numbers, holds {values.dtype}")
    slot.destination.copy_(values)
    return values.nbytes


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        try:
            names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index} cannot be read: {type(error).__name__}: {error}") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ConfigError(
                    f"{index}: weight_map must name safetensors files of this folder, got {ascii(name)[:64]}"
                )
        files = [folder / name for name in names]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ConfigError(f"{folder}: weight files named in {index.name} are missing: {', '.join(absent)}")
        return files
    if single.is_file():
        return [single]
    raise ConfigError(f"{folder} holds neither {single.name} nor {index.name}: only safetensors weights can be loaded")


def _fill_dummy(slots: dict[str, WeightSlot], seed: int) -> None:
    """Norm weights 1, biases and matrices normal with a small deviation, the same for the same seed."""
    noise = torch.randn(_DUMMY_PERIOD, generator=torch.Generator().manual_seed(seed)) * _DUMMY_STD
    offset = 0
    for name, slot in slots.items():
        destination = slot.destination
        if destination is None:
            continue
        if name.endswith("norm.weight"):
            destination.fill_(1.0)
            continue
        values = noise.to(destination.device, destination.dtype).roll(offset)
        flat = destination.view(-1)
        for begin in range(0, flat.numel(), _DUMMY_PERIOD):
            piece = flat[begin : begin + _DUMMY_PERIOD]
            piece.copy_(values[: piece.numel()])
        offset += flat.numel()


def _listed(names: dict[str, WeightSlot]) -> str:
    shown = list(names)[:5]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
