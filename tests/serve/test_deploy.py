"""The deployment recipes fit together and to the project, and their container's command does what they promise."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pagedcore_triton.metric_families import gauges
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from pagedcore.serve.triton_install import ensure_tritonserver
from pagedcore.serve.triton_server import child_environment, find_free_ports
from tests.serve.processes import assert_nothing_is_left, wait_for
from tests.triton.clients import MODEL, grpc_stream
from tests.triton.repository import ENGINE_ARGUMENTS

ROOT = Path(__file__).parent.parent.parent
KUBERNETES = ROOT / "deploy" / "kubernetes"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents(KUBERNETES / "pagedcore.yaml") if document["kind"] == kind)
    return found


@pytest.fixture
def container() -> dict[str, Any]:
    found: dict[str, Any] = manifest("Deployment")["spec"]["template"]["spec"]["containers"][0]
    return found


def mount_config_map(root: Path, changes: dict[str, str]) -> None:
    """Lay the ConfigMap's volume out under `root` as Kubernetes does: links to hidden folders with the data of a moment."""
    data = manifest("ConfigMap")["data"] | changes
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (volume,) = (volume for volume in pod["volumes"] if "configMap" in volume)
    (mount,) = (mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == volume["name"])
    folder = root / mount["mountPath"].removeprefix("/")
    for item in volume["configMap"]["items"]:
        path = folder / "..2026" / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data[item["key"]])
        name = Path(item["path"]).parts[0]
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..data").symlink_to("..2026")


def test_each_patience_is_longer_than_the_one_inside_it(container: dict[str, Any]) -> None:
    command = " ".join([*container["command"], *container["args"]])
    config = manifest("ConfigMap")["data"]["config.pbtxt"]

    def seconds(pattern: str, text: str) -> float:
        found = re.search(pattern, text)
        assert found is not None
        return float(found[1])

    drain = seconds(r'"DRAIN_SECONDS" value \{ string_value: "(\d+)" \}', config)
    exit_timeout, grace = seconds(r"--exit-timeout-secs=(\d+)", command), seconds(r"--grace=(\d+)", command)
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert drain < exit_timeout < grace < pod["terminationGracePeriodSeconds"] - before


def test_the_image_starts_as_the_manifest_does(container: dict[str, Any]) -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", "")
    assert json.loads(dockerfile.rpartition("CMD ")[2]) == [*container["command"], *container["args"]]


def test_the_readmes_volume_is_where_the_image_keeps_its_model() -> None:
    cache = re.search(r"^ENV XDG_CACHE_HOME=(\S+)$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    volume = re.search(r"-v pagedcore-cache:(\S+)", (ROOT / "deploy" / "README.md").read_text())
    assert cache is not None and volume is not None and cache[1] == volume[1]


def test_the_autoscaler_reads_a_gauge_that_is_exported() -> None:
    (autoscaler,) = documents(KUBERNETES / "autoscaler.yaml")
    (adapter,) = documents(KUBERNETES / "prometheus-adapter-values.yaml")
    (rule,) = adapter["rules"]["custom"]
    (metric,) = autoscaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    name = re.search(r'__name__="([^"]+)"', rule["seriesQuery"])
    assert name is not None and name[1] in {gauge.name for gauge in gauges()}


def container_command(container: dict[str, Any], root: Path, prefix: str, ports: Sequence[int]) -> list[str]:
    """The container's command with its file system under `root`, and this machine's tritonserver on free ports."""
    installation = ensure_tritonserver()
    command = [argument.replace("/models", str(root / "models")) for argument in container["command"][1:]]
    command += [argument.replace("/models", str(root / "models")) for argument in container["args"]]
    command = [argument.replace("=pagedcore_", f"={prefix}") for argument in command]
    command[command.index("tritonserver")] = str(installation.binary)
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    return [sys.executable, *command, f"--backend-directory={installation.backend_directory}"]


def assert_closed_to_clients(http: int, grpc: int) -> None:
    for path in ("systemsharedmemory/status", "cudasharedmemory/status", "trace/setting", "logging"):
        command = ["curl", "-so", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{http}/v2/{path}"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "403", path
    with InferenceServerClient(f"127.0.0.1:{grpc}") as client:
        for ask in (client.get_system_shared_memory_status, client.get_model_repository_index, client.get_log_settings):
            with pytest.raises(InferenceServerException, match="This protocol is restricted"):
                ask()
        assert client.is_model_ready(MODEL)


def test_no_recipe_opens_a_port_to_the_internet() -> None:
    (task,) = documents(ROOT / "deploy" / "skypilot.yaml")
    assert "ports" not in task["resources"] and "service" not in task and "HOST" not in task["run"]
    published = re.findall(r"^docker run.* -p (\S+)", (ROOT / "deploy" / "README.md").read_text(), re.MULTILINE)
    assert published and all(ports.startswith("127.0.0.1:") for ports in published)


def test_the_containers_command_serves_and_ends_what_is_open_with_an_answer(
    container: dict[str, Any], tmp_path: Path
) -> None:
    """With the model repository as Kubernetes mounts it; the model's own time to drain is set to nothing."""
    config = manifest("ConfigMap")["data"]["config.pbtxt"]
    at_once = config.replace('DRAIN_SECONDS" value { string_value: "25', 'DRAIN_SECONDS" value { string_value: "0')
    mount_config_map(tmp_path, {"config.pbtxt": at_once, "model.json": json.dumps(ENGINE_ARGUMENTS)})
    prefix = f"deploy{os.getpid()}_"
    http, grpc, metrics = find_free_ports("127.0.0.1", 3)
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            container_command(container, tmp_path, prefix, (http, grpc, metrics)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=child_environment(ensure_tritonserver().libpython),
        ) as guard,
    ):
        try:
            ready = ["curl", "-sf", f"http://127.0.0.1:{http}{container['readinessProbe']['httpGet']['path']}"]
            assert wait_for(lambda: guard.poll() is not None or subprocess.run(ready, check=False).returncode == 0, 60)
            assert subprocess.run(container["livenessProbe"]["exec"]["command"], check=False).returncode == 0
            assert_closed_to_clients(http, grpc)
            with grpc_stream(f"127.0.0.1:{grpc}") as stream:
                sampling = json.dumps({"max_tokens": 300, "ignore_eos": True})
                stream.send({"text_input": "one two three", "stream": True, "sampling_parameters": sampling})
                stream.next()
                guard.send_signal(signal.SIGTERM)
                with pytest.raises(InferenceServerException, match="the server is shutting down"):
                    while True:
                        assert not stream.next()[2]
        finally:
            guard.terminate()
            guard.wait()
    assert_nothing_is_left(prefix)
