"""Runs a command until it or standard input ends or a signal comes, then removes its processes and shared memory.

Standard input is a pipe held by the parent, so that the clean-up also happens when the parent is killed. A byte in it ends the
command at once, without waiting for running requests.
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
        at_once = False
        with contextlib.suppress(KeyboardInterrupt):
            at_once = _wait_for_end(server)
        if server.poll() is None and not at_once:
            # To the stubs as well: the models end what is open, as the server would only cut it off.
            os.killpg(server.pid, signal.SIGTERM)
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


def _wait_for_end(server: subprocess.Popen[bytes]) -> bool:
    """Return when the server has ended or the parent has written to, closed, or died and so closed, our standard input.

    The result says whether it has written: it wants the end at once.
    """
    while server.poll() is None:
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], _POLL_S)
        if readable:
            return bool(os.read(sys.stdin.fileno(), 1))
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
