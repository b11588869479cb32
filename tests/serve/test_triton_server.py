"""A real tritonserver starts, runs in this virtual environment, and goes without leaving a process or shared memory."""

from __future__ import annotations

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pagedcore.serve.cache import SetupError
from pagedcore.serve.triton_install import ensure_tritonserver, find_libpython
from pagedcore.serve.triton_server import TritonServer, failure_reason, find_free_ports
from tests.serve.processes import assert_nothing_is_left, processes_with, shared_memory_with, wait_for


def _ask(server: TritonServer, text: str) -> Any:
    body = json.dumps({"text_input": text}).encode()
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/llm/generate", body, timeout=30) as answer:
        return ast.literal_eval(json.load(answer)["text_output"])


def test_serves_in_this_environment_and_leaves_nothing(echo_repository: Path) -> None:
    with TritonServer(echo_repository) as server:
        facts = _ask(server, "héllo")
        assert facts["echo"] == "héllo"
        assert facts["prefix"] == sys.prefix
        assert facts["omp"] == "PASSIVE"
        assert facts["arenas"] == "2"
        assert facts["stub_pid"] in processes_with(server.shm_prefix)
        assert shared_memory_with(server.shm_prefix)
        with urllib.request.urlopen(server.metrics_url, timeout=10) as metrics:
            assert b"nv_inference_request_success" in metrics.read()
        with socket.create_connection((server.host, server.grpc_port), timeout=10):
            pass
    assert_nothing_is_left(server.shm_prefix)
    server.log_path.unlink()


@pytest.mark.parametrize("victim", ["server", "stub", "guard"])
def test_a_killed_process_takes_the_others_with_it(echo_repository: Path, tmp_path: Path, victim: str) -> None:
    server = TritonServer(echo_repository, log_path=tmp_path / "log")
    with server:
        stub = _ask(server, "")["stub_pid"]
        triton = int(Path(f"/proc/{stub}/stat").read_text().rpartition(")")[2].split()[1])
        guard = int(Path(f"/proc/{triton}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill({"server": triton, "stub": stub, "guard": guard}[victim], signal.SIGTERM if victim == "guard" else 9)
        if victim != "stub":
            assert wait_for(lambda: not server.is_running(), 30)
    assert_nothing_is_left(server.shm_prefix)


_PARENT = """
import pathlib, sys, time
from pagedcore.serve.triton_server import TritonServer
with TritonServer(pathlib.Path(sys.argv[1]), log_path=pathlib.Path(sys.argv[2])) as server:
    print(server.shm_prefix, flush=True)
    time.sleep(60)
"""


def test_the_server_does_not_outlive_a_killed_parent(echo_repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PARENT, str(echo_repository), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        prefix = parent.stdout.readline().strip()
        assert len(processes_with(prefix)) == 3
        parent.kill()
    assert wait_for(lambda: not processes_with(prefix), 30)
    assert_nothing_is_left(prefix)


def _guard(prefix: str, *command: str, code: tuple[str, ...] = ("-m", "pagedcore.serve.guard")) -> list[str]:
    return [sys.executable, *code, "--detached", f"--shm-prefix={prefix}", "--grace=20", *command]


def test_a_guards_end_leaves_the_regions_of_its_like_alone() -> None:
    """As in two containers that share /dev/shm and were started by the same command."""
    prefix = f"guarded{os.getpid()}_"
    make_region = ["sh", "-c", 'touch "/dev/shm/$0region"; exec sleep 60', prefix + "{unique}_"]
    with (
        subprocess.Popen(_guard(prefix + "{unique}_", *make_region)) as first,
        subprocess.Popen(_guard(prefix + "{unique}_", *make_region)) as second,
    ):
        try:
            assert wait_for(lambda: len(shared_memory_with(prefix)) == 2, 20)
            first.terminate()
            first.wait()
            assert len(shared_memory_with(prefix)) == 1
        finally:
            first.terminate()
            second.terminate()
    assert_nothing_is_left(prefix)


# A signal comes when the server's process is there and the guard does not know it yet. A container may forbid what it may here.
_EARLY_SIGNAL = """
import os, signal, subprocess, sys
from pagedcore.serve import guard

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

def refuse(*arguments):
    raise PermissionError

subprocess.Popen = Popen
os.sched_setscheduler = refuse
sys.exit(guard.main(sys.argv[1:]))
"""


def test_a_signal_while_the_server_is_being_started_ends_it() -> None:
    prefix = f"guarded{os.getpid()}_"
    command = ["sh", "-c", "sleep 60 & wait", prefix]
    result = subprocess.run(_guard(prefix, *command, code=("-c", _EARLY_SIGNAL)), timeout=50, check=False)
    assert result.returncode == 256 - signal.SIGTERM  # of the server, which got the signal and was not killed
    assert_nothing_is_left(prefix)


def test_free_ports_are_different_ones() -> None:
    for _ in range(3):
        ports = find_free_ports("127.0.0.1", 500)
        assert len(set(ports)) == 500


def test_a_model_that_does_not_load_is_reported_in_one_line(failing_repository: Path, tmp_path: Path) -> None:
    server = TritonServer(failing_repository, log_path=tmp_path / "log")
    expected = 'tritonserver stopped: ValueError: dtype must be one of auto, float32, got "int3" (log: '
    with pytest.raises(SetupError) as caught, server:
        pass
    assert str(caught.value).startswith(expected)
    assert_nothing_is_left(server.shm_prefix)


def test_reason_of_a_server_that_did_not_start() -> None:
    reason = "tritonserver: error while loading shared libraries: libz.so.1: no such file"
    assert failure_reason(f'I1123 06:49:53.4 7 a.cc:1] "fine"\n{reason}\n') == reason
    assert failure_reason("") == "its log names no error"


def _installed_binary(folder: Path) -> Path:
    binary = folder / "bin" / "tritonserver"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec {ensure_tritonserver().binary} "$@"\n')
    binary.chmod(0o755)
    return binary


def test_an_installed_tritonserver_is_used_with_its_own_backends(echo_repository: Path, tmp_path: Path) -> None:
    binary = _installed_binary(tmp_path)
    (tmp_path / "backends").symlink_to(ensure_tritonserver().backend_directory)
    installation = ensure_tritonserver(binary)
    assert installation.binary == binary
    assert installation.backend_directory == tmp_path / "backends"
    with TritonServer(echo_repository, installation=installation, log_path=tmp_path / "log") as server:
        assert _ask(server, "installed")["echo"] == "installed"


def test_an_installed_tritonserver_of_another_python_is_refused(tmp_path: Path) -> None:
    binary = _installed_binary(tmp_path)
    backend = tmp_path / "backends" / "python"
    backend.mkdir(parents=True)
    (backend / "triton_python_backend_stub").write_bytes(b"...libpython3.99.so.1.0...")
    with pytest.raises(SetupError, match=r"embeds Python 3\.99, but .* make setup PYTHON=python3\.99"):
        ensure_tritonserver(binary)


def test_a_path_that_is_no_tritonserver_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"TRITONSERVER=.* is not an executable file"):
        ensure_tritonserver(tmp_path / "missing")
    with pytest.raises(SetupError, match="comes without the Python backend"):
        ensure_tritonserver(Path("/bin/sh"))


def test_libpython_is_the_one_of_this_python() -> None:
    assert find_libpython().name == f"libpython3.{sys.version_info.minor}.so.1.0"
