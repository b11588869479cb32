"""Runs tritonserver until it or standard input ends or a signal comes, then removes its processes and shared memory.

Standard input is a pipe held by the parent, so that the clean-up also happens when the parent is killed. A byte in it ends the
server at once, without waiting for running requests. With --detached only a signal counts, as in a container.

In the prefix and the command, {unique} stands for a text that no other run has: containers can share /dev/shm, and their process
ids. {secret} in the command is one that nobody knows, to close an endpoint that a key would open.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
from pathlib import Path

_POLL_S = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status (negative: the signal that killed it)."""
    parser = argparse.ArgumentParser(prog="guard.py", description=__doc__)
    parser.add_argument("--shm-prefix", required=True, help="of the command's regions in /dev/shm, which are removed")
    parser.add_argument("--grace", type=float, required=True, help="seconds that the command has to end after a signal")
    parser.add_argument("--detached", action="store_true", help="leave standard input alone")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    unique = secrets.token_hex(6)
    shm_prefix = given.shm_prefix.replace("{unique}", unique)
    secret = secrets.token_hex(16)
    command = [part.replace("{unique}", unique).replace("{secret}", secret) for part in given.command]
    # A signal waits until there is somebody to pass it on to.
    early: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: early.append(number))
    # Inherited by server and stub: a thread that wakes up to send a token does not throw a kernel off its core half-way, for
    # which all other cores would have to wait.
    with contextlib.suppress(PermissionError):  # it may be forbidden in a container
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        at_once = False
        with contextlib.suppress(KeyboardInterrupt):
            for number in _SIGNALS:
                signal.signal(number, signal.default_int_handler)
            if early:
                raise KeyboardInterrupt
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
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # what follows takes a moment and must be whole
        # Also after an orderly end: a crashed server leaves its stubs behind, in its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for region in Path("/dev/shm").glob(f"{shm_prefix}*"):
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
