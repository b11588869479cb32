"""Runs a command until it or standard input ends or a signal comes, then removes its processes and shared memory.

Standard input is a pipe held by the parent, so that the clean-up also happens when the parent is killed.
Usage: python guard.py SHARED_MEMORY_PREFIX COMMAND...
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

_GRACE_S = 20.0  # the server waits for running requests and for the model's finalize()
_POLL_S = 0.1


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status (negative: the signal that killed it)."""
    prefix, command = arguments[0], arguments[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    # Inherited by server and stub: a thread that wakes up to send a token does not throw a kernel off its core half-way, for
    # which all other cores would have to wait.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _wait_for_end(server)
        if server.poll() is None:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_GRACE_S)
    finally:
        # Also after an orderly end: a crashed server leaves its stubs behind, in its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for region in Path("/dev/shm").glob(f"{prefix}*"):
            region.unlink(missing_ok=True)
    return server.returncode


def _wait_for_end(server: subprocess.Popen[bytes]) -> None:
    """Return when the server has ended or the parent has closed, or died and so closed, our standard input."""
    while server.poll() is None:
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], _POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
