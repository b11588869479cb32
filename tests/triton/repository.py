"""A model repository for the tests of the real tritonserver."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.triton.clients import MODEL

ROOT = Path(__file__).parent.parent.parent
# float32, because its greedy tokens equal transformers'; a short context, so that prompts that do not fit stay small.
ENGINE_ARGUMENTS: dict[str, Any] = {
    "model": "SmolLM2-135M-Instruct",
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "num_gpu_blocks_override": 2048,
}


def write_repository(folder: Path, **arguments: Any) -> Path:
    """A copy of the project's model repository with other engine arguments."""
    repository = folder / "model_repository"
    shutil.copytree(ROOT / "model_repository", repository)
    write_arguments(repository, **arguments)
    return repository


def write_arguments(repository: Path, **arguments: Any) -> None:
    (repository / MODEL / "1" / "model.json").write_text(json.dumps(ENGINE_ARGUMENTS | arguments))
