"""Runs tritonserver until it or standard input ends or a signal comes, then removes its processes and shared memory.

Standard input is a pipe held by the parent, so that the clean-up also happens when the parent is killed. A byte in it ends the
server at once, without waiting for running requests. With --detached only a signal counts, as in a container.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

_POLL_S = 0.1


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status (negative: the signal that killed it)."""
    parser = argparse.ArgumentParser(prog="guard.py", description=__doc__)
    parser.add_argument("--shm-prefix", required=True, help="of the command's regions in /dev/shm, which are removed")
    parser.add_argument("--grace", type=float, required=True, help="seconds that the command has to end after a signal")
    parser.add_argument("--detached", action="store_true", help="leave standard input alone")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    # Inherited by server and stub: a thread that wakes up to send a token does not throw a kernel off its core half-way, for
    # which all other cores would have to wait.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    server = subprocess.Popen(given.command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        at_once = False
        with contextlib.suppress(KeyboardInterrupt):
            if given.detached:
                server.wait()
            else:
                at_once = _wait_for_end(server)
        if server.poll() is None and not at_once:
            # To the stubs as well: the models end what is open, as the server would only cut it off.
            os.killpg(server.pid, signal.SIGTERM)
            # A server with an open gRPC stream does not end by itself, not even when its own time is over (Triton 2.51).
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(given.grace)
    finally:
        # Also after an orderly end: a crashed server leaves its stubs behind, in its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for region in Path("/dev/shm").glob(f"{given.shm_prefix}*"):
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
