"""`make serve`: what it refuses, in one line each, and that a started one answers as printed and stops cleanly."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pagedcore.errors import ConfigError
from pagedcore.serve.cache import SetupError
from pagedcore.serve.default_model import DEFAULT_MODEL_NAME, default_model_path
from pagedcore.serve.launcher import ServeOptions, check_model_folder, check_ports, copy_repository, report_errors
from pagedcore.serve.reservations import RUN_FOLDER_PREFIX, run_folder
from pagedcore.serve.triton_server import find_free_ports
from tests.serve.processes import assert_nothing_is_left, processes_with, shared_memory_with, wait_for
from tests.triton.clients import generate


def _free_ports() -> tuple[int, int, int]:
    http, grpc, metrics = find_free_ports("127.0.0.1", 3)
    return http, grpc, metrics


def _command(repository: Path, ports: tuple[int, int, int]) -> list[str]:
    flags = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    log = f"--log={repository.parent / 'tritonserver.log'}"
    return [sys.executable, "-m", "pagedcore.serve", f"--model-repository={repository}", log, *flags]


@contextmanager
def _served(
    repository: Path, ports: tuple[int, int, int], output: Path, *flags: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m pagedcore.serve`, ready, its output in `output`."""
    command = [*_command(repository, ports), *flags]
    with output.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            assert wait_for(lambda: "\nEOF\n" in output.read_text() or process.poll() is not None, 60)
            assert process.poll() is None, output.read_text()
            yield process
        finally:
            process.kill()


def _run_on(repository: Path, ports: tuple[int, int, int]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(repository, ports), capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["HTTP_PORT", "GRPC_PORT", "METRICS_PORT"])
def test_a_taken_port_is_named_before_anything_is_loaded(echo_repository: Path, name: str) -> None:
    ports = _free_ports()
    index = ["HTTP_PORT", "GRPC_PORT", "METRICS_PORT"].index(name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[index]))
        taken.listen()
        result = _run_on(echo_repository, ports)
    port = ports[index]
    choice = f"make serve {name}={port + 10}"
    assert result.stderr == f"error: port {port} on 127.0.0.1 is taken; choose another one: {choice}\n"
    assert result.stdout == ""
    assert result.returncode == 1


def test_unusable_ports_and_hosts_are_refused() -> None:
    options = ServeOptions(http_port=18000, grpc_port=18001, metrics_port=18002)
    with pytest.raises(SetupError, match=r"GRPC_PORT must be in \[1, 65535\], got 70000"):
        check_ports(replace(options, grpc_port=70000))
    with pytest.raises(SetupError, match="must differ, got 18000 twice"):
        check_ports(replace(options, metrics_port=18000))
    with pytest.raises(SetupError, match=r"HOST=192\.0\.2\.1 is not an IPv4 address of this machine"):
        check_ports(replace(options, host="192.0.2.1"))
    with pytest.raises(SetupError, match=r"HOST=::1 is not an IPv4 address of this machine"):
        check_ports(replace(options, host="::1"))


def test_unsuitable_model_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"MODEL=.*/missing is not a folder"):
        check_model_folder(tmp_path / "missing")
    with pytest.raises(SetupError, match=r"it has no config\.json"):
        check_model_folder(tmp_path)
    config = json.loads((default_model_path() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ConfigError, match="MambaForCausalLM"):
        check_model_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError, match=r"has no weights: no \*\.safetensors"):
        check_model_folder(tmp_path)
    check_model_folder(default_model_path())


def test_serving_another_model_leaves_the_repository_as_it_is(echo_repository: Path, tmp_path: Path) -> None:
    original = (echo_repository / "llm" / "1" / "model.json").read_text()
    copy = copy_repository(echo_repository, tmp_path / "run", Path("/models/other"))
    assert json.loads((copy / "llm" / "1" / "model.json").read_text()) == {"model": "/models/other", "max_num_seqs": 8}
    assert (echo_repository / "llm" / "1" / "model.json").read_text() == original


@pytest.mark.parametrize(("chosen", "served"), [(None, "/models/small"), (Path("/models/other"), "/models/other")])
def test_a_second_model_keeps_its_own_weights(
    echo_repository: Path, tmp_path: Path, chosen: Path | None, served: str
) -> None:
    (echo_repository / "llm" / "1" / "model.json").write_text('{"model": "/models/small"}')
    shutil.copytree(echo_repository / "llm", echo_repository / "big")
    (echo_repository / "big" / "1" / "model.json").write_text('{"model": "/models/big"}')
    copy = copy_repository(echo_repository, tmp_path / "run", chosen)
    models = {name: json.loads((copy / name / "1" / "model.json").read_text())["model"] for name in ("llm", "big")}
    assert models == {"llm": served, "big": "/models/big"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "must be a JSON object: "),
        (b"[]", "must be a JSON object, got list"),
        (b"{}", '"model" must name a model folder'),
        (b'{"model": "a", "model": "b"}', "must not repeat a key, got 'model' 2 times"),
        (b'{"model": "a", "swap_space": NaN}', "must hold finite numbers only, got NaN"),
        (b'{"model": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_broken_model_json_is_refused(echo_repository: Path, content: bytes, reason: str) -> None:
    (echo_repository / "llm" / "1" / "model.json").write_bytes(content)
    result = _run_on(echo_repository, _free_ports())
    assert result.returncode == 1
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_full_disk_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def write_to_full_disk() -> None:
        with open("/dev/full", "w") as full:
            full.write("x")

    assert report_errors(write_to_full_disk) == 1
    assert capsys.readouterr().err.startswith("error: no space left on the disk of ")


def test_a_model_that_does_not_load_ends_the_command_with_its_reason(failing_repository: Path) -> None:
    result = _run_on(failing_repository, _free_ports())
    assert result.returncode == 1
    assert 'error: tritonserver stopped: ValueError: dtype must be one of auto, float32, got "int3"' in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_what_it_prints_works_as_typed(echo_repository: Path, tmp_path: Path) -> None:
    ports = _free_ports()
    output = tmp_path / "output"
    with _served(echo_repository, ports, output):
        text = output.read_text()
        curl = re.search(r"^curl .*$", text, re.MULTILINE)
        script = re.search(r"^\S+python\S* - <<'EOF'\n.*^EOF$", text, re.MULTILINE | re.DOTALL)
        assert curl is not None
        assert script is not None
        for command in (curl[0], script[0]):
            answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
            assert "Photosynthesis is the process by which" in answer.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_server_and_stub_and_leaves_nothing(
    echo_repository: Path, tmp_path: Path, number: signal.Signals
) -> None:
    ports = _free_ports()
    with _served(echo_repository, ports, tmp_path / "output") as process:
        prefix = f"pagedcore_{process.pid}_"
        assert len(processes_with(prefix)) == 3
        assert shared_memory_with(prefix)
        process.send_signal(number)
        assert process.wait(30) == 0
    assert_nothing_is_left(prefix)


def test_ctrl_c_ends_a_real_answer_with_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """The stream would go on for minutes; its client is told, and the model is unloaded in an orderly way."""
    repository = shutil.copytree(Path("model_repository"), tmp_path / "model_repository")
    ports = _free_ports()
    parameters = json.dumps({"max_tokens": 8000, "ignore_eos": True})
    body = json.dumps({"text_input": "Once upon a time", "stream": True, "sampling_parameters": parameters}).encode()
    with _served(repository, ports, tmp_path / "output", f"--model={DEFAULT_MODEL_NAME}") as process:
        prefix = f"pagedcore_{process.pid}_"
        url = f"http://127.0.0.1:{ports[0]}/v2/models/llm/generate_stream"
        with urllib.request.urlopen(url, body, timeout=30) as answer:
            assert json.loads(answer.readline().removeprefix(b"data: "))["text_output"]
            process.send_signal(signal.SIGINT)
            events = [json.loads(line.removeprefix(b"data: ")) for line in answer if line.strip()]
        assert process.wait(60) == 0
    assert all("error" not in event for event in events[:-1])
    assert events[-1] == {"error": "Error generating stream: the server is shutting down"}
    assert "successfully unloaded 'llm'" in (tmp_path / "tritonserver.log").read_text()
    assert_nothing_is_left(prefix)


def test_a_signal_while_loading_leaves_nothing(echo_repository: Path) -> None:
    model = echo_repository / "llm" / "1" / "model.py"
    model.write_text(
        model.read_text().replace(
            "    def execute", "    def initialize(self, args):\n        import time; time.sleep(60)\n\n    def execute"
        )
    )
    with subprocess.Popen(_command(echo_repository, _free_ports()), stdout=subprocess.DEVNULL) as process:
        prefix = f"pagedcore_{process.pid}_"
        assert wait_for(lambda: bool(shared_memory_with(prefix)), 30)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert_nothing_is_left(prefix)


def test_a_server_that_dies_ends_the_command_with_an_error(echo_repository: Path, tmp_path: Path) -> None:
    with _served(echo_repository, _free_ports(), tmp_path / "output") as process:
        (server,) = [
            identifier
            for identifier in processes_with(f"pagedcore_{process.pid}_")
            if Path(f"/proc/{identifier}/exe").resolve().name == "tritonserver"
        ]
        os.kill(server, signal.SIGKILL)
        assert process.wait(30) == 1
    assert "error: tritonserver stopped: " in (tmp_path / "output").read_text()


def test_a_killed_model_process_ends_the_command_with_an_error(echo_repository: Path, tmp_path: Path) -> None:
    """Triton itself would say that it is ready for ever, and fail every request."""
    with _served(echo_repository, _free_ports(), tmp_path / "output") as process:
        prefix = f"pagedcore_{process.pid}_"
        (stub,) = set(processes_with(prefix)) & set(processes_with("triton_python_backend_stub"))
        os.kill(stub, signal.SIGKILL)
        assert process.wait(10) == 1
    assert (
        "error: the model's process has ended: it was killed or has crashed (log: " in (tmp_path / "output").read_text()
    )
    assert_nothing_is_left(prefix)


# The real model, but for its executor: after a few steps the device is broken.
_DYING_MODEL = """
from pagedcore_triton.model import TritonPythonModel as Model

class TritonPythonModel(Model):
    def initialize(self, args):
        super().initialize(args)
        executor = self._engine._engine._executor
        run, steps = executor._run, iter(range(10**6))

        def fail_after_a_few(buffer):
            if next(steps) >= 5:
                raise RuntimeError("the device is broken")
            return run(buffer)

        executor._run = fail_after_a_few
"""


def test_a_dead_engine_answers_every_request_and_ends_the_command(tmp_path: Path) -> None:
    repository = shutil.copytree(Path("model_repository"), tmp_path / "model_repository")
    (repository / "llm" / "1" / "model.py").write_text(_DYING_MODEL)
    ports = _free_ports()
    body = {"text_input": "Once", "stream": True, "sampling_parameters": '{"max_tokens": 50}'}
    errors: list[str | None] = []
    with _served(repository, ports, tmp_path / "output", f"--model={DEFAULT_MODEL_NAME}") as process:
        prefix = f"pagedcore_{process.pid}_"
        while len(errors) < 3:  # each of them fails a step, and the third step is the engine's end
            errors.append(generate(f"127.0.0.1:{ports[0]}", body, stream=True).error)
        assert process.wait(10) == 1
    reason = "3 steps in a row failed; internal error (RuntimeError), see the server's log"
    once = "Error generating stream: internal error (RuntimeError), see the server's log"
    assert errors == [once, once, f"Error generating stream: the engine has stopped: {reason}"]
    output = (tmp_path / "output").read_text()
    cause = "RuntimeError('the device is broken')"
    assert f"error: the model's process has ended: its engine has died: {reason}: {cause} (log: " in output
    assert "Traceback" not in output
    assert_nothing_is_left(prefix)


def test_of_two_started_on_the_same_ports_one_serves_and_the_other_says_why_not(
    echo_repository: Path, tmp_path: Path
) -> None:
    """The second one starts while the first one loads its model, and so before its ports are bound."""
    model = echo_repository / "llm" / "1" / "model.py"
    model.write_text(
        model.read_text().replace(
            "    def execute", "    def initialize(self, args):\n        import time; time.sleep(4)\n\n    def execute"
        )
    )
    ports = _free_ports()
    outputs = [tmp_path / "first", tmp_path / "second"]
    files = [output.open("wb") for output in outputs]
    processes = [subprocess.Popen(_command(echo_repository, ports), stdout=file, stderr=file) for file in files]
    try:
        assert wait_for(lambda: any("\nEOF\n" in output.read_text() for output in outputs), 60)
        assert wait_for(lambda: any(process.poll() is not None for process in processes), 60)
        loser = next(number for number, process in enumerate(processes) if process.poll() is not None)
        winner = 1 - loser
        assert re.fullmatch(
            rf"error: port {ports[0]} is taken by another `make serve` .*; choose another one: .*\n",
            outputs[loser].read_text(),
        )
        assert processes[loser].returncode == 1
        assert processes[winner].poll() is None
        assert "Started HTTPService" in (echo_repository.parent / "tritonserver.log").read_text()
        processes[winner].send_signal(signal.SIGINT)
        assert processes[winner].wait(30) == 0
    finally:
        for process, file in zip(processes, files, strict=True):
            process.kill()
            process.wait()
            file.close()


def test_what_a_killed_launcher_left_behind_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("abandoned", "new"):
        (tmp_path / f"{RUN_FOLDER_PREFIX}{name}").mkdir()
    (tmp_path / f"{RUN_FOLDER_PREFIX}abandoned" / "model_repository").mkdir()
    with run_folder() as first:
        (first / "model_repository").mkdir()
        with run_folder() as second:
            assert sorted(tmp_path.iterdir()) == sorted([first, second, tmp_path / f"{RUN_FOLDER_PREFIX}new"])
    assert [path.name for path in tmp_path.iterdir()] == [f"{RUN_FOLDER_PREFIX}new"]


@pytest.mark.parametrize("flag", ["--http-port=abc", "--grpc-port=", "--metrics-port=-1"])
def test_a_port_that_is_no_number_is_one_line(flag: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pagedcore.serve", flag], capture_output=True, text=True, timeout=60, check=False
    )
    name, _, value = flag.partition("=")
    assert result.stderr == f"error: argument {name}: must be an integer in [1, 65535], got {value!r}\n"
    assert result.returncode == 2


def test_an_unusable_cache_folder_is_one_line(echo_repository: Path) -> None:
    result = subprocess.run(
        _command(echo_repository, _free_ports()),
        env={**os.environ, "XDG_CACHE_HOME": "/dev/null/x"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert re.fullmatch(r"error: /dev/null/x\S*: Not a directory\n", result.stderr)
    assert result.returncode == 1


def test_the_launcher_does_not_import_torch() -> None:
    code = "import sys, pagedcore.serve.launcher, pagedcore.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
