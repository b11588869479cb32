"""What `make serve` does: checks ports and model, starts tritonserver, says what to type next, waits and stops."""

from __future__ import annotations

import contextlib
import errno
import json
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pagedcore.config import read_engine_arguments
from pagedcore.errors import ConfigError
from pagedcore.serve.cache import SetupError, cache_root, python_executable
from pagedcore.serve.default_model import DEFAULT_MODEL_NAME, is_default_model, resolve_model
from pagedcore.serve.reservations import reserved_ports, run_folder
from pagedcore.serve.triton_install import TritonInstallation, ensure_tritonserver
from pagedcore.serve.triton_server import TritonServer, is_alive

_READY_TIMEOUT_S = 1800.0  # large checkpoints on slow disks
_EXIT_TIMEOUT_S = 10  # by then the model has ended what was open after Ctrl-C
_POLL_S = 0.2
_MODEL_NAME = "llm"  # the one that MODEL= is about
_console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class ServeOptions:
    """What `make serve` can be told; an empty `model` means the one named in model.json, no `log` a file in the cache."""

    model: str = ""
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    model_repository: Path = Path("model_repository")
    tritonserver: Path | None = None
    log: Path | None = None

    def ports(self) -> dict[str, int]:
        """The ports by the name of their setting."""
        return {"HTTP_PORT": self.http_port, "GRPC_PORT": self.grpc_port, "METRICS_PORT": self.metrics_port}


class _ModelDied(SetupError):
    """The server runs on without the process that its model lived in."""


def report_errors(action: Callable[[], object]) -> int:
    """Run `action`; what a user can cause becomes one line on stderr. Returns the exit status."""
    try:
        action()
        return 0
    except (SetupError, ConfigError) as error:
        message = str(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left on the disk of {error.filename or cache_root()}"
        else:
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 1


def prepare(options: ServeOptions) -> TritonInstallation:
    """Obtain what is downloaded once: tritonserver and the model of model.json (or `options.model`)."""
    installation = ensure_tritonserver(options.tritonserver)
    resolve_model(options.model or _configured_model(options))
    return installation


def serve(options: ServeOptions) -> None:
    """Serve in the foreground until SIGINT or SIGTERM.

    Raises:
        SetupError: a taken port, an unsuitable model folder, a failed start, or a server that ended by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    check_ports(options)
    with reserved_ports(options.ports()):
        name = options.model or _configured_model(options)
        if options.model and not is_default_model(options.model):
            check_model_folder(Path(options.model).expanduser())
        installation = prepare(options)
        with run_folder() as folder:
            chosen = resolve_model(options.model) if options.model else None
            repository = copy_repository(options.model_repository, folder, chosen)
            _run(_server(options, repository, installation), name)


def _server(options: ServeOptions, repository: Path, installation: TritonInstallation) -> TritonServer:
    return TritonServer(
        repository,
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        log_path=options.log or _log_path(options.http_port),
        exit_timeout=_EXIT_TIMEOUT_S,
        installation=installation,
    )


def _run(server: TritonServer, model: str) -> None:
    try:
        with _step(f"loading {model}"):
            server.start()
            server.wait_until_ready(_READY_TIMEOUT_S)
        _console.print(welcome(server), markup=False)
        _wait_for_signal(server)
    except _ModelDied:
        server.stop(at_once=True)
        raise
    finally:
        # A second Ctrl-C must not interrupt the clean-up.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if server.is_running():
            with _step("stopping"):
                server.stop()


def check_ports(options: ServeOptions) -> None:
    """Raise SetupError unless the three ports are valid, distinct and free."""
    ports = options.ports()
    for name, port in ports.items():
        if not 1 <= port <= 65535:
            raise SetupError(f"{name} must be in [1, 65535], got {port}")
        if list(ports.values()).count(port) > 1:
            raise SetupError(f"HTTP_PORT, GRPC_PORT and METRICS_PORT must differ, got {port} twice")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.host, port))
            except socket.gaierror:
                raise SetupError(f"HOST={options.host} is not an IPv4 address of this machine") from None
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise SetupError(f"HOST={options.host} is not an IPv4 address of this machine") from None
                reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
                raise SetupError(
                    f"port {port} on {options.host} {reason}; choose another one: make serve {name}={port + 10}"
                ) from None


def check_model_folder(folder: Path) -> None:
    """Raise SetupError or ConfigError unless `folder` holds a Hugging Face model of a supported architecture."""
    from pagedcore.models.config import ModelConfig

    if not folder.is_dir():
        raise SetupError(f"MODEL={folder} is not a folder, nor {DEFAULT_MODEL_NAME}")
    if not (folder / "config.json").is_file():
        raise SetupError(f"MODEL={folder} is not a Hugging Face model folder: it has no config.json")
    ModelConfig.from_folder(folder)
    if not any(folder.glob("*.safetensors")):
        raise SetupError(f"MODEL={folder} has no weights: no *.safetensors file in it")


def copy_repository(repository: Path, into: Path, model: Path | None) -> Path:
    """Copy the model repository, so that serving never changes the original.

    `model`, unless it is None, is what the copy's `llm` serves; all others serve what their own model.json names.
    """
    if not repository.is_dir():
        raise SetupError(f"model repository {repository} not found; run this in the project's folder")
    copy = into / "model_repository"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if model is not None:
        for path in copy.glob(f"{_MODEL_NAME}/*/model.json"):
            arguments = {**read_engine_arguments(path), "model": str(model)}
            path.write_text(json.dumps(arguments, indent=2), encoding="utf-8")
    return copy


def welcome(server: TritonServer) -> str:
    """What to type next: a curl command and a tritonclient script, both working as printed."""
    # The address 0.0.0.0 means "every interface" to a server and nothing to a client.
    host = "127.0.0.1" if server.host == "0.0.0.0" else server.host
    prompt = "Photosynthesis is the process by which"
    parameters = json.dumps({"max_tokens": 32, "temperature": 0})
    body = json.dumps({"text_input": prompt, "stream": True, "sampling_parameters": parameters})
    return f"""
Ready. HTTP {server.http_url}, gRPC {server.grpc_url}, metrics {server.metrics_url}; log: {server.log_path}
Ctrl-C stops it. In another terminal, type:

curl -N http://{host}:{server.http_port}/v2/models/llm/generate_stream -d {shlex.quote(body)}

or, with tritonclient:

{python_executable()} - <<'EOF'
import queue
import numpy as np
import tritonclient.grpc as triton

def tensor(name, value, dtype):
    tensor = triton.InferInput(name, [1], dtype)
    tensor.set_data_from_numpy(np.array([value], dtype=bool if dtype == "BOOL" else object))
    return tensor

inputs = [tensor("text_input", b"{prompt}", "BYTES"), tensor("stream", True, "BOOL"),
          tensor("sampling_parameters", b'{parameters}', "BYTES")]
answers = queue.Queue()
with triton.InferenceServerClient("{host}:{server.grpc_port}") as client:
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("llm", inputs, enable_empty_final_response=True)
    final = False
    while not final:
        result, error = answers.get()
        if error:
            raise error
        text = result.as_numpy("text_output")
        print("" if text is None else text[0].decode(), end="", flush=True)
        final = result.get_response().parameters["triton_final_response"].bool_param
print()
EOF
"""


def _configured_model(options: ServeOptions) -> str:
    path = options.model_repository / _MODEL_NAME / "1" / "model.json"
    if not path.is_file():
        raise SetupError(f"{path} not found; run this in the project's folder")
    model = read_engine_arguments(path).get("model", "")
    if not isinstance(model, str) or not model:
        raise SetupError(f'{path}: "model" must name a model folder, got {model!r}')
    return model


def _log_path(http_port: int) -> Path:
    folder = cache_root() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"tritonserver-{http_port}.log"


def _wait_for_signal(server: TritonServer) -> None:
    stubs = server.stub_processes()
    try:
        while server.is_running():
            # Triton 2.51 would go on without the model's process: it says it is ready, and fails every request.
            if not all(map(is_alive, stubs)):
                reason = server.model_failure_reason()
                raise _ModelDied(f"the model's process has ended: {reason} (log: {server.log_path})")
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        return
    raise SetupError(f"tritonserver stopped: {server.failure_reason()} (log: {server.log_path})")


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    """Show a running step, then how long it took."""
    start = time.monotonic()
    if not _console.is_terminal:
        _console.print(f"{name} ...")
    with _console.status(f"{name} ..."):
        yield
    _console.print(f"{name}: {time.monotonic() - start:.1f} s")
