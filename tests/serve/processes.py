"""What is left of a server: its processes and its shared memory, found by the unique prefix on their command lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def processes_with(text: str) -> list[int]:
    """Ids of the living processes whose command line contains `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text in command and state != "Z":
            found.append(int(folder.name))
    return found


def shared_memory_with(prefix: str) -> list[str]:
    """Names in /dev/shm that begin with `prefix`."""
    return [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]


def assert_nothing_is_left(prefix: str) -> None:
    """Neither a process nor shared memory; a process that was killed takes a moment to be gone."""
    wait_for(lambda: not processes_with(prefix), 5)
    assert processes_with(prefix) == []
    assert shared_memory_with(prefix) == []


def wait_for(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait up to `timeout` seconds for `condition`; returns whether it became true."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
