"""One tritonserver process: started on free or given ports, awaited until ready, and stopped without leftovers."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from pagedcore.serve import guard
from pagedcore.serve.cache import SetupError, python_executable
from pagedcore.serve.triton_install import STUB_NAME, TritonInstallation, ensure_tritonserver

_STOP_MARGIN_S = 1.0  # from the end of the server's own patience to its being killed
_POLL_S = 0.1


class TritonServer:
    """Owns one tritonserver, its stubs and their shared memory; use it as a context manager or start() and stop() it.

    After start() the ports are known; leaving the `with` block, stop(), and the death of this process (even by SIGKILL)
    all end the server and its stubs and remove their regions from /dev/shm.
    """

    def __init__(
        self,
        model_repository: Path,
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        exit_timeout: int = 15,
        extra_args: Sequence[str] = (),
        log_path: Path | None = None,
        installation: TritonInstallation | None = None,
        ready_timeout: float = 120.0,
    ) -> None:
        """Port 0 means any free port; without `log_path` the log goes to a temporary file; `ready_timeout` in seconds
        is how long the `with` statement waits, `exit_timeout` how long stop() lets open requests and streams keep the
        server."""
        self.model_repository = model_repository
        self.host = host
        free = find_free_ports(host, 3)
        self.http_port, self.grpc_port, self.metrics_port = (
            http_port or free[0],
            grpc_port or free[1],
            metrics_port or free[2],
        )
        self.log_path = log_path or Path(tempfile.gettempdir(), f"tritonserver-{uuid.uuid4().hex}.log")
        self.shm_prefix = f"pagedcore_{os.getpid()}_{uuid.uuid4().hex[:12]}_"
        self._exit_timeout = exit_timeout
        self._extra_args = list(extra_args)
        self._has_metrics = "--allow-metrics=false" not in extra_args
        self._installation = installation
        self._ready_timeout = ready_timeout
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def http_url(self) -> str:
        """Host and port of the HTTP endpoint, as `tritonclient.http` wants them."""
        return f"{self.host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Host and port of the gRPC endpoint, as `tritonclient.grpc` wants them."""
        return f"{self.host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus endpoint."""
        return f"http://{self.host}:{self.metrics_port}/metrics"

    def start(self) -> None:
        """Start the server; raises SetupError if no tritonserver can be provided."""
        assert self._guard is None, "already started"
        installation = self._installation or ensure_tritonserver()
        grace = self._exit_timeout + _STOP_MARGIN_S
        options = [f"--shm-prefix={self.shm_prefix}", f"--grace={grace:g}"]
        command = [python_executable(), "-IS", guard.__file__, *options, *self._command(installation)]
        with self.log_path.open("wb") as log:
            self._guard = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(installation.libpython),
                start_new_session=True,
            )

    def wait_until_ready(self, timeout: float) -> None:
        """Wait until every model is ready and the metrics endpoint, which tritonserver opens last, takes connections.

        Raises:
            SetupError: the server ended, with the reason from its log, or `timeout` seconds passed.
        """
        deadline = time.monotonic() + timeout
        while not (self.is_ready() and (not self._has_metrics or self._takes_connections(self.metrics_port))):
            if not self.is_running():
                raise SetupError(f"tritonserver stopped: {self.failure_reason()} (log: {self.log_path})")
            if time.monotonic() > deadline:
                raise SetupError(f"tritonserver is not ready after {timeout:.0f} s (log: {self.log_path})")
            time.sleep(_POLL_S)

    def is_running(self) -> bool:
        """True until the server process and its stubs have ended."""
        return self._guard is not None and self._guard.poll() is None

    def is_ready(self) -> bool:
        """True if the server answers that all of its models are ready."""
        connection = http.client.HTTPConnection(self.host, self.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _takes_connections(self, port: int) -> bool:
        try:
            socket.create_connection((self.host, port), timeout=5).close()
        except OSError:
            return False
        return True

    def stub_processes(self) -> list[int]:
        """Ids of the processes that the server's models live in."""
        return [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if all(text in _command_line(folder) for text in (STUB_NAME, self.shm_prefix))
        ]

    def stop(self, at_once: bool = False) -> None:
        """Stop the server and its stubs and remove their shared memory; does nothing if it is not running.

        Open requests may go on for the while that the models give them, but not if `at_once`.
        """
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._guard.stdin as stdin:  # broken: the server has ended by itself
            if at_once:
                stdin.write(b"\n")
        self._guard.wait()  # the guard's patience is bounded
        self._guard = None

    def failure_reason(self) -> str:
        """The line of the log that says why the server ended."""
        return failure_reason(self.log_path.read_text(errors="replace"))

    def model_failure_reason(self) -> str:
        """The line of the log in which the model says why its process ends, or that there is none."""
        match = re.search(r"^CRITICAL [\w.]+: (.*)$", self.log_path.read_text(errors="replace"), re.MULTILINE)
        return match[1] if match else "it was killed or has crashed"

    def __enter__(self) -> TritonServer:
        self.start()
        try:
            self.wait_until_ready(self._ready_timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self, installation: TritonInstallation) -> list[str]:
        return [
            str(installation.binary),
            f"--model-repository={self.model_repository.resolve()}",
            f"--backend-directory={installation.backend_directory}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--http-address={self.host}",
            f"--http-port={self.http_port}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self.metrics_port}",
            f"--exit-timeout-secs={self._exit_timeout}",
            *self._extra_args,
        ]


def child_environment(libpython: Path) -> dict[str, str]:
    """Environment for tritonserver and its stubs.

    The stub embeds Python, which takes the first `python3` on PATH for its own executable and so finds this virtual
    environment. OpenMP threads sleep instead of spinning, because server, stub and clients share the cores. Memory comes from
    few arenas of malloc, unless the caller's environment says how many: of one for each thread, each keeps what it once held.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
    environment["PATH"] = f"{sys.prefix}/bin:{environment.get('PATH', '/usr/bin:/bin')}"
    inherited = environment.get("LD_LIBRARY_PATH")
    environment["LD_LIBRARY_PATH"] = f"{libpython.parent}:{inherited}" if inherited else str(libpython.parent)
    environment.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0", KMP_BLOCKTIME="0", HF_HUB_OFFLINE="1")
    environment.setdefault("MALLOC_ARENA_MAX", "2")
    return environment


def is_alive(process: int) -> bool:
    """False for the id of a process that has ended, whether or not its parent has noticed."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def _command_line(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def find_free_ports(host: str, count: int) -> list[int]:
    """Different TCP ports that nothing listens on at the moment."""
    with contextlib.ExitStack() as stack:  # all are held until the last one is found, or one could come twice
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in probes]


def failure_reason(log: str) -> str:
    """Say in one line why tritonserver ended: the model's exception without traceback, or the server's own error."""
    # The server escapes line breaks and quotes; "At:" begins a Python traceback.
    prefix = r"(?:failed to load '[^']*' version \d+: \w+: |Failed to initialize Python stub[^:]*: )"
    if match := re.search(prefix + r'(.*?)(?:\\n\\nAt:|"$)', log, re.MULTILINE):
        return match[1].replace('\\"', '"').removeprefix("TritonModelException: ")
    errors = [line for line in log.splitlines() if re.match(r"E\d{4} |error:", line) or "error while loading" in line]
    return errors[-1] if errors else "its log names no error"
