"""pagedcore in the place of vllm_backend: installed as the backend `vllm`, with upstream's configuration and clients' calls."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException

from pagedcore.serve.cache import SetupError
from pagedcore.serve.install_backend import install_backend, is_ours
from pagedcore.serve.triton_install import TritonInstallation, ensure_tritonserver
from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import TIMEOUT, grpc_stream, wait_until
from tests.triton.judge import Judge
from tests.triton.repository import ENGINE_ARGUMENTS

MODEL = "vllm_model"
CONFIG = """backend: "vllm"
instance_group [{ count: 1 kind: KIND_MODEL }]
"""
PROMPT = "The most dangerous animal is"


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's backends: Triton's Python backend, and vllm_backend's place."""
    folder = tmp_path_factory.mktemp("backends")
    (folder / "python").symlink_to(ensure_tritonserver().backend_directory / "python")
    return folder


@pytest.fixture(scope="module")
def server(backends: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    command = [sys.executable, "-m", "pagedcore.serve.install_backend", "--backends", str(backends), "--name", "vllm"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"To undo: rm -r {backends}/vllm" in shown
    folder = tmp_path_factory.mktemp("vllm")
    version = folder / "models" / MODEL / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(CONFIG)
    arguments = ENGINE_ARGUMENTS | {"gpu_memory_utilization": 0.5, "enforce_eager": True, "disable_log_requests": True}
    (version / "model.json").write_text(json.dumps(arguments))
    found = ensure_tritonserver()
    installation = TritonInstallation(found.binary, backends, found.libpython)
    with TritonServer(folder / "models", log_path=folder / "log", installation=installation) as running:
        yield running


@pytest.fixture(scope="module")
def text(judge: Judge) -> str:
    return judge.continuation(PROMPT, 16).text


def post(server: TritonServer, way: str, body: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """With curl, as upstream's instructions do; the status and the answers."""
    url = f"http://{server.http_url}/v2/models/{MODEL}/{way}"
    command = ["curl", "-s", "-w", "\n%{http_code}", "-X", "POST", url, "-d", json.dumps(body)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT).stdout.splitlines()
    return int(lines[-1]), [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line]


def test_the_calls_of_vllm_backends_readme(server: TritonServer, text: str) -> None:
    """With defaults: 16 tokens and, without streaming, the prompt before them."""
    parameters = {"stream": False, "temperature": 0, "exclude_input_in_output": False}
    status, (answer,) = post(server, "generate", {"text_input": PROMPT, "parameters": parameters})
    assert (status, answer) == (200, {"model_name": MODEL, "model_version": "1", "text_output": PROMPT + text})
    status, events = post(
        server, "generate_stream", {"text_input": PROMPT, "parameters": {"stream": True, "temperature": 0}}
    )
    assert status == 200 and len(events) == 16
    assert "".join(event["text_output"] for event in events) == text


async def stream_as_upstreams_sample_client(url: str, prompts: list[str], sampling: dict[str, str]) -> dict[str, str]:
    """All prompts on one asynchronous stream, each with its own id, until as many final responses have come."""

    def tensor(name: str, value: Any, data_type: str) -> Any:
        found = grpcclient.InferInput(name, [1], data_type)
        found.set_data_from_numpy(np.array([value], dtype=np.object_ if data_type == "BYTES" else bool))
        return found

    async def requests() -> Any:
        for number, prompt in enumerate(prompts):
            inputs = [
                tensor("text_input", prompt.encode(), "BYTES"),
                tensor("stream", True, "BOOL"),
                tensor("sampling_parameters", json.dumps(sampling).encode(), "BYTES"),
                tensor("exclude_input_in_output", True, "BOOL"),
            ]
            outputs = [grpcclient.InferRequestedOutput("text_output")]
            yield {"model_name": MODEL, "inputs": inputs, "outputs": outputs, "request_id": str(number)}

    texts: dict[str, str] = dict.fromkeys(map(str, range(len(prompts))), "")
    num_final = 0
    async with grpcclient.InferenceServerClient(url) as client:
        async for result, error in client.stream_infer(requests(), stream_timeout=TIMEOUT):
            assert error is None
            response = result.get_response()
            texts[response.id] += result.as_numpy("text_output")[0].decode()
            num_final += response.parameters["triton_final_response"].bool_param
            if num_final == len(prompts):
                break
    return texts


def test_the_flow_of_vllm_backends_sample_client(server: TritonServer, judge: Judge, text: str) -> None:
    prompts = ["Hello, my name is", PROMPT, "The capital of France is", "The future of AI is"]
    sampling = {"temperature": "0", "top_p": "1", "max_tokens": "16"}
    texts = asyncio.run(stream_as_upstreams_sample_client(server.grpc_url, prompts, sampling))
    assert texts["1"] == text
    assert texts["2"] == judge.continuation(prompts[2], 16).text
    assert len(texts) == 4 and all(texts.values())


def test_a_decoupled_model_is_for_streams_only(server: TritonServer) -> None:
    """Triton's own answers to a plain gRPC call, and to a stream at the HTTP endpoint of single responses."""

    async def infer() -> None:
        tensor = grpcclient.InferInput("text_input", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([PROMPT.encode()], dtype=np.object_))
        async with grpcclient.InferenceServerClient(server.grpc_url) as client:
            await client.infer(MODEL, [tensor])

    with pytest.raises(InferenceServerException, match="doesn't support models with decoupled transaction policy"):
        asyncio.run(infer())
    _, (answer,) = post(server, "generate", {"text_input": PROMPT, "stream": True, "max_tokens": 3})
    assert "expects model to produce exactly 1 response" in answer["error"]


def test_cancellation_is_logged_as_upstream_does(server: TritonServer) -> None:
    endless = '{"max_tokens": 900, "ignore_eos": true}'
    with grpc_stream(server.grpc_url, MODEL) as stream:
        stream.send({"text_input": PROMPT, "stream": True, "sampling_parameters": endless})
        stream.next()
        stream.cancel()
    for line in ("[vllm] Cancelling the request", "[vllm] Successfully cancelled the request"):
        wait_until(lambda line=line: line in server.log_path.read_text())  # type: ignore[misc]


def test_another_backend_is_never_overwritten(backends: Path, server: TritonServer, tmp_path: Path) -> None:
    assert is_ours(install_backend(backends, "vllm")), "again is fine"
    (backends / "other").mkdir()
    (backends / "other" / "model.py").write_text("# somebody else's\n")
    for name, reason in (
        ("other", "holds another backend, which is not overwritten; to keep it aside: mv "),
        ("python", "holds another backend"),
        ("../x", "NAME must be letters"),
    ):
        with pytest.raises(SetupError, match=reason):
            install_backend(backends, name)
    assert (backends / "other" / "model.py").read_text() == "# somebody else's\n"
    with pytest.raises(SetupError, match="is not a folder of Triton backends"):
        install_backend(tmp_path, "vllm")


def test_the_installed_backend_finds_its_packages_by_itself(backends: Path, server: TritonServer) -> None:
    """Started by the Python that this environment was made from, which has none of them."""
    utilities, model = str(backends / "python"), str(backends / "vllm" / "model.py")
    code = f"import runpy, sys; sys.path.append({utilities!r}); runpy.run_path({model!r})"
    base = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    without = subprocess.run([base, "-I", "-c", "import pagedcore_triton"], capture_output=True, check=False)
    assert without.returncode != 0
    result = subprocess.run([base, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
