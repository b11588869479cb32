"""A model repository that needs no engine: its model echoes the input, or fails to load with a given message."""

from __future__ import annotations

from pathlib import Path

import pytest

_CONFIG = """
backend: "python"
max_batch_size: 0
input [
  { name: "text_input" data_type: TYPE_STRING dims: [1] },
  { name: "stream" data_type: TYPE_BOOL dims: [1] optional: true },
  { name: "sampling_parameters" data_type: TYPE_STRING dims: [1] optional: true }
]
output [{ name: "text_output" data_type: TYPE_STRING dims: [-1] }]
instance_group [{ count: 1 kind: KIND_MODEL }]
model_transaction_policy { decoupled: true }
"""

# Answers with the text it got, then with the facts about its process that the tests want to know.
_ECHO = """
import os, sys
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            text = pb.get_input_tensor_by_name(request, "text_input").as_numpy()[0].decode()
            facts = {"echo": text, "prefix": sys.prefix, "omp": os.environ["OMP_WAIT_POLICY"],
                     "arenas": os.environ["MALLOC_ARENA_MAX"], "stub_pid": os.getpid()}
            value = np.array([repr(facts).encode()], dtype=object)
            response = pb.InferenceResponse([pb.Tensor("text_output", value)])
            request.get_response_sender().send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

_FAILING = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError('dtype must be one of auto, float32, got "int3"')

    def execute(self, requests):
        pass
"""


def _write_repository(folder: Path, code: str) -> Path:
    version = folder / "model_repository" / "llm" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(code)
    (version / "model.json").write_text('{"model": "SmolLM2-135M-Instruct", "max_num_seqs": 8}')
    (version.parent / "config.pbtxt").write_text(_CONFIG)
    return folder / "model_repository"


@pytest.fixture
def echo_repository(tmp_path: Path) -> Path:
    """A model repository with one model, `llm`, that echoes its input."""
    return _write_repository(tmp_path, _ECHO)


@pytest.fixture
def failing_repository(tmp_path: Path) -> Path:
    """A model repository with one model, `llm`, whose initialize() raises."""
    return _write_repository(tmp_path, _FAILING)
