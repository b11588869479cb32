"""What processes hold, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holdings:
    """Resident memory in MiB, and how many file descriptors."""

    memory: float = 0.0
    num_files: int = 0

    def since(self, before: Holdings) -> Holdings:
        return Holdings(self.memory - before.memory, self.num_files - before.num_files)


def holdings(pids: Iterable[int]) -> Holdings:
    """Those of these processes together."""
    memory, num_files = 0.0, 0
    for pid in pids:
        folder = Path("/proc", str(pid))
        memory += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        num_files += len(list((folder / "fd").iterdir()))
    return Holdings(memory, num_files)
