"""Virtual environments for tools of others, in the cache, so that none of them is a dependency of this project."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pagedcore.serve.cache import cache_root


def ensure_environment(name: str, requirements: Sequence[str], program: str) -> Path:
    """Return the folder of a virtual environment that has `program`, made with pip if absent; raises CalledProcessError."""
    folder = cache_root() / "peers" / name
    if not (folder / "bin" / program).exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *requirements], check=True)
    return folder
