"""Where the engine reads the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# Seconds from any moment on; never less than before. That of a server is time.monotonic.
Clock: TypeAlias = Callable[[], float]
