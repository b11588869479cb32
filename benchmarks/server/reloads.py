"""What 50 reloads of a model leave in tritonserver, beside what those of a Python model that does nothing leave.

Every second time the loaded model is replaced, because model.json has changed; otherwise it is unloaded and loaded. Each time
it serves a request.

Usage: python benchmarks/server/reloads.py
"""

from __future__ import annotations

import http.client
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.server.metrics_cost import make_model, write_repository
from pagedcore.serve.triton_server import TritonServer

NUM_RELOADS, NUM_SETTLING = 50, 10  # the first ones fill allocators and pools
_NOTHING = """
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            tensor = pb.Tensor("text_output", np.array([b"x"], dtype=object))
            sender = request.get_response_sender()
            sender.send(pb.InferenceResponse([tensor]), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
_NOTHING_CONFIG = """
backend: "python"
model_transaction_policy { decoupled: true }
input [{ name: "text_input" data_type: TYPE_STRING dims: [1] }]
output [{ name: "text_output" data_type: TYPE_STRING dims: [1] }]
instance_group [{ kind: KIND_CPU }]
"""


@dataclass(frozen=True)
class Usage:
    """What tritonserver holds."""

    memory_mib: float
    threads: int
    descriptors: int
    regions: int  # in /dev/shm
    models: int  # processes


def usage(server: TritonServer, process: int) -> Usage:
    """Of the server with that process id."""
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text(encoding="utf-8").splitlines())
    return Usage(
        int(status["VmRSS"].split()[0]) / 1024,
        int(status["Threads"]),
        len(list((folder / "fd").iterdir())),
        len(list(Path("/dev/shm").glob(f"{server.shm_prefix}*"))),
        len(server.stub_processes()),
    )


def post(server: TritonServer, path: str, body: object) -> None:
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    connection.request("POST", path, json.dumps(body))
    response = connection.getresponse()
    content = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"{path}: {content!r}")


def wait_for_models(server: TritonServer, number: int) -> None:
    while len(server.stub_processes()) != number:
        time.sleep(0.02)


def reload_model(server: TritonServer, number: int) -> None:
    """Load the model anew, and ask it something."""
    path = server.model_repository / "llm" / "1" / "model.json"
    if number % 2:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": number}))
    else:
        post(server, "/v2/repository/models/llm/unload", {})
        wait_for_models(server, 0)
    post(server, "/v2/repository/models/llm/load", {})
    wait_for_models(server, 1)
    post(server, "/v2/models/llm/generate", {"text_input": "one two three"})


def measure(repository: Path, folder: Path) -> tuple[Usage, Usage]:
    """After the first reloads, and after all."""
    arguments = ["--model-control-mode=explicit"]
    with TritonServer(repository, log_path=folder / "log", exit_timeout=5, extra_args=arguments) as server:
        post(server, "/v2/repository/models/llm/load", {})
        (process,) = (int(Path(f"/proc/{stub}/stat").read_text().split()[3]) for stub in server.stub_processes())
        for number in range(NUM_RELOADS):
            if number == NUM_SETTLING:
                before = usage(server, process)
            reload_model(server, number)
        return before, usage(server, process)


def nothing_repository(folder: Path) -> Path:
    version = folder / "llm" / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(_NOTHING_CONFIG)
    (version / "model.py").write_text(_NOTHING)
    (version / "model.json").write_text("{}")
    return folder


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = write_repository(folder / "own", make_model(folder / "model"), disable_log_stats=False)
        for label, repository in (("", own), (", a model that does nothing", nothing_repository(folder / "nothing"))):
            before, after = measure(repository, folder)
            for field, unit in (
                ("memory_mib", "MiB"),
                ("threads", "threads"),
                ("descriptors", "descriptors"),
                ("regions", "regions"),
                ("models", "processes"),
            ):
                rows.append(
                    report.row(
                        f"{field.removesuffix('_mib')} after {NUM_RELOADS} reloads{label}",
                        getattr(after, field),
                        unit,
                        f"after {NUM_SETTLING}",
                        getattr(before, field),
                        higher_is_better=False,
                    )
                )
            shutil.rmtree(repository)
    report.write(
        "reloads", rows, "of tritonserver's process; half of the reloads replace a loaded model, half unload it first"
    )


if __name__ == "__main__":
    main()
