"""The model repository of a soak: the shipped one, with a small model and little room."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pagedcore.serve.default_model import ensure_default_model
from tests.triton.repository import write_repository as write_shipped

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
# What the GPU's kernels are made for; bits that depend on the batch would change the canaries' text.
_GPU_SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
GPU_ARGUMENTS: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "batch_invariant": True}
# Few blocks and a short queue: requests are preempted, swapped and refused.
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "load_format": "dummy",
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "num_gpu_blocks_override": 128,
    "swap_space": 0.01,
    "max_queue_size": 64,
}


def write_repository(folder: Path, **arguments: Any) -> Path:
    """Write model and repository into `folder`, with other engine arguments."""
    default, model = ensure_default_model(), folder / "model"
    model.mkdir()
    for path in default.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, model / path.name)
    config = json.loads((default / "config.json").read_text(encoding="utf-8"))
    shape = _SHAPE | (_GPU_SHAPE if arguments.get("device") == "cuda" else {})
    (model / "config.json").write_text(json.dumps(config | shape), encoding="utf-8")
    return write_shipped(folder, **(ARGUMENTS | {"model": str(model)} | arguments))
