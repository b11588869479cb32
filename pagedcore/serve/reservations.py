"""What one `make serve` has for itself on this machine: its ports from the start on, and a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from pagedcore.serve.cache import SetupError

RUN_FOLDER_PREFIX = "pagedcore-serve-"


@contextlib.contextmanager
def reserved_ports(ports: Mapping[str, int]) -> Iterator[None]:
    """Keep `ports`, by the name of their setting, from every other `make serve` until the end.

    tritonserver binds its ports only when the model is loaded. Names in Linux's abstract namespace reach as far as ports do,
    and the kernel drops them with the process.

    Raises:
        SetupError: another one has one of them.
    """
    with contextlib.ExitStack() as held:
        for name, port in ports.items():
            holder = held.enter_context(socket.socket(socket.AF_UNIX))
            try:
                holder.bind(f"\0{RUN_FOLDER_PREFIX}{port}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise SetupError(
                    f"port {port} is taken by another `make serve` that is starting or running; "
                    f"choose another one: make serve {name}={port + 10}"
                ) from None
        yield


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A temporary folder, removed at the end; those that a killed process has left behind are removed now."""
    for abandoned in Path(tempfile.gettempdir()).glob(f"{RUN_FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(abandoned):
            # An empty one may be so new that its owner has not locked it yet.
            if any(abandoned.iterdir()):
                shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(prefix=RUN_FOLDER_PREFIX) as name, _locked(Path(name)):
        yield Path(name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on `folder`, which the kernel drops when the process dies; OSError where it is held by another."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
