"""A machine that has run out of something, and processes that end: what clients see, and that nothing is left."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import shlex
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from pagedcore.serve.triton_install import TritonInstallation
from pagedcore.serve.triton_server import TritonServer
from tests.faults.conftest import Measure
from tests.serve.processes import assert_nothing_is_left, processes_with, wait_for
from tests.triton.clients import (
    generate,
    generate_grpc,
    grpc_stream,
    infer_request,
    metric,
    stream_infer,
    wait_until,
)
from tests.triton.repository import write_repository

pytestmark = pytest.mark.slow

SHM_MIB = 64  # docker's default
TIMEOUT = 4.0  # of a client, in seconds
GREEDY = {"text_input": "Once upon a time", "sampling_parameters": '{"temperature": 0, "max_tokens": 8}'}
ENDLESS = {"text_input": "Once", "stream": True, "sampling_parameters": '{"max_tokens": 900, "ignore_eos": true}'}


class SmallShmServer(TritonServer):
    """Has a /dev/shm of its own, as in a container."""

    def _command(self, installation: TritonInstallation) -> list[str]:
        command = shlex.join(super()._command(installation))
        return [
            *("unshare", "--mount", "sh", "-c"),
            f"mount -t tmpfs -o size={SHM_MIB}m tmpfs /dev/shm && exec {command}",
        ]


def triton_process(server: TritonServer) -> int:
    (found,) = [
        process
        for process in processes_with(server.shm_prefix)
        if Path(f"/proc/{process}/exe").resolve().name == "tritonserver"
    ]
    return found


def status(server: TritonServer, path: str) -> int:
    connection = http.client.HTTPConnection(server.http_url, timeout=TIMEOUT)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_what_clients_see_of_a_crash_without_the_launcher(
    tmp_path: Path, number: signal.Signals, measure: Measure
) -> None:
    """Triton 2.51 refuses new requests, but calls the model ready, and leaves open streams to their clients' deadlines."""
    with TritonServer(write_repository(tmp_path), log_path=tmp_path / "log", exit_timeout=2) as server:
        with ThreadPoolExecutor() as clients:
            request = infer_request(ENDLESS)
            open_streams = [clients.submit(stream_infer, server.grpc_url, [request], timeout=TIMEOUT) for _ in range(4)]
            wait_until(lambda: metric(server.metrics_url, "vllm:num_requests_running") == len(open_streams))
            (model,) = server.stub_processes()
            os.kill(model, number)
            assert wait_for(lambda: server.stub_processes() == [], TIMEOUT)
            begin = time.monotonic()
            refusal = generate(server.http_url, GREEDY)
            seconds = time.monotonic() - begin
            for open_stream in open_streams:
                error = open_stream.exception()
                assert isinstance(error, grpc.RpcError)
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "is not healthy" in (refusal.error or "")
        assert status(server, "/v2/models/llm/ready") == 200
    assert_nothing_is_left(server.shm_prefix)
    measure(seconds, TIMEOUT)


def test_a_second_signal_while_draining_changes_nothing(tmp_path: Path, measure: Measure) -> None:
    with TritonServer(write_repository(tmp_path), log_path=tmp_path / "log") as server:
        with grpc_stream(server.grpc_url) as stream:
            stream.send(ENDLESS)
            stream.next()
            begin = time.monotonic()
            for _ in range(3):
                for process in (*server.stub_processes(), triton_process(server)):
                    os.kill(process, signal.SIGTERM)
                time.sleep(0.5)
            with pytest.raises(Exception, match="the server is shutting down"):
                while True:
                    stream.next()
        assert wait_for(lambda: not server.is_running(), 30)
        seconds = time.monotonic() - begin
    assert_nothing_is_left(server.shm_prefix)
    measure(seconds, 30.0)


def test_a_log_that_cannot_be_written_is_not_needed(tmp_path: Path) -> None:
    """Every write to it fails as on a full disk, also the one that tells of a refused request."""
    with TritonServer(write_repository(tmp_path), log_path=Path("/dev/full")) as server:
        assert generate(server.http_url, GREEDY).error is None
        assert generate(server.http_url, GREEDY | {"sampling_parameters": "{"}).code == "INVALID_ARG"
        assert generate(server.http_url, GREEDY).error is None
    assert_nothing_is_left(server.shm_prefix)


def test_a_closed_standard_output_is_not_needed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    server = TritonServer(write_repository(tmp_path), log_path=log)
    server.start()
    server.wait_until_ready(120)
    os.close(reader)
    try:
        for _ in range(3):
            assert generate(server.http_url, GREEDY).error is None
            assert generate(server.http_url, GREEDY | {"sampling_parameters": "{"}).code == "INVALID_ARG"
    finally:
        server.stop()
    assert_nothing_is_left(server.shm_prefix)


@contextmanager
def file_limit(process: int, more: int) -> Iterator[None]:
    """The process may open so many files more than it has."""
    limits = resource.prlimit(process, resource.RLIMIT_NOFILE)
    count = len(list(Path(f"/proc/{process}/fd").iterdir()))
    resource.prlimit(process, resource.RLIMIT_NOFILE, (count + more, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_NOFILE, limits)


def test_at_the_limit_of_open_files_running_requests_go_on(tmp_path: Path) -> None:
    with TritonServer(write_repository(tmp_path), log_path=tmp_path / "log") as server:
        alone = generate_grpc(server.grpc_url, GREEDY | {"stream": True}).text
        with grpc_stream(server.grpc_url) as stream, file_limit(triton_process(server), 2):
            stream.send(ENDLESS)
            connections = [http.client.HTTPConnection(server.http_url, timeout=1) for _ in range(20)]
            assert any(_is_refused(connection) for connection in connections)
            stream.next()
            stream.cancel()
            for connection in connections:
                connection.close()
        assert generate_grpc(server.grpc_url, GREEDY | {"stream": True}).text == alone
        assert generate(server.http_url, GREEDY).error is None
    assert_nothing_is_left(server.shm_prefix)


def _is_refused(connection: http.client.HTTPConnection) -> bool:
    try:
        connection.request("GET", "/v2/health/live")
        return connection.getresponse().status != 200
    except (OSError, http.client.HTTPException):
        return True


def test_a_full_dev_shm_fails_what_does_not_fit_and_nothing_else(tmp_path: Path) -> None:
    with SmallShmServer(write_repository(tmp_path), log_path=tmp_path / "log") as server:
        alone = generate(server.http_url, GREEDY)
        assert alone.error is None
        long: dict[str, Any] = {"text_input": "a" * (8 << 20)}
        assert "at most 1048576 bytes" in (generate(server.http_url, long).error or "")
        filler = Path(
            "/proc", str(triton_process(server)), "root", "dev", "shm", "filler"
        )  # as the server sees its own
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        long = {"text_input": "a" * (32 << 20)}
        assert "shared memory" in (generate(server.http_url, long).error or "")
        assert generate(server.http_url, GREEDY) == alone
        filler.unlink()
        assert generate(server.http_url, GREEDY) == alone
    assert_nothing_is_left(server.shm_prefix)


def test_a_last_response_that_does_not_fit_dev_shm_ends_with_an_error(tmp_path: Path) -> None:
    """More than 2 MB of log probabilities, in the only response; what is smaller goes on."""
    sampling = {"max_tokens": 100, "n": 16, "logprobs": 20, "ignore_eos": True}
    large = {"text_input": "Once", "return_logprobs": True, "sampling_parameters": json.dumps(sampling)}
    with SmallShmServer(write_repository(tmp_path), log_path=tmp_path / "log") as server:
        alone = generate(server.http_url, GREEDY)
        filler = Path("/proc", str(triton_process(server)), "root", "dev", "shm", "filler")
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        answer = generate(server.http_url, large)
        assert answer.texts == []
        assert re.fullmatch(
            r"Error generating stream: internal error \(\w+\), see the server's log", answer.error or ""
        )
        assert generate(server.http_url, GREEDY) == alone
        filler.unlink()
        assert len(generate(server.http_url, large).texts) == 1
    assert_nothing_is_left(server.shm_prefix)
