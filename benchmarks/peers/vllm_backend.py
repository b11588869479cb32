"""A model repository for the official vllm_backend, run by the same tritonserver as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

NAME = "vllm_backend"

# Triton's stub knows nothing of the environment that vLLM is in, nor of the backend's own folder. It needs numpy 1, which packages
# that vLLM does without do not go with; the processes that vLLM starts get the machine's own numpy.
_MODEL_PY = """import os
import sys

import numpy

sys.modules.update(dict.fromkeys(("accelerate", "scipy", "sklearn")))
sys.path[:0] = [{vllm!r}, {source!r}, {machine!r}]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
with open({path!r}, encoding="utf-8") as file:
    exec(compile(file.read(), {path!r}, "exec"))
"""
_CONFIG = 'backend: "python"\ninstance_group [{ count: 1 kind: KIND_MODEL }]\n'


def write_repository(folder: Path, source: Path, vllm: Path, arguments: dict[str, Any]) -> Path:
    """One model, `llm`, of these vLLM arguments; returns the repository.

    source: the `src` folder of a checkout of vllm_backend. vllm: a folder with vLLM and what it needs (pip install --target).
    """
    version = folder / "llm" / "1"
    version.mkdir(parents=True)
    (folder / "llm" / "config.pbtxt").write_text(_CONFIG, encoding="utf-8")
    (version / "model.json").write_text(json.dumps(arguments), encoding="utf-8")
    paths = {"vllm": vllm, "source": source, "path": source / "model.py", "machine": Path(torch.__file__).parents[1]}
    text = _MODEL_PY.format(**{name: str(path.resolve()) for name, path in paths.items()})
    (version / "model.py").write_text(text, encoding="utf-8")
    return folder
