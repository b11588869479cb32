"""A lock among the processes of one tritonserver's model instances."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from pathlib import Path


class ServerLock:
    """Held by at most one of the server's model instances that name it alike; free again when its holder's process ends.

    It is a socket's address that only one process can have, and that leaves nothing behind (Linux's abstract namespace).
    """

    def __init__(self, *name: str) -> None:
        # The server is this process's parent; containers may share the network, and with it the addresses, but no process ids.
        server = (str(Path("/proc/self/ns/pid").stat().st_ino), str(os.getppid()))
        digest = hashlib.sha256("\0".join((*server, *name)).encode()).hexdigest()
        self._address = f"\0pagedcore-{digest}"
        self._socket: socket.socket | None = None

    def try_acquire(self) -> bool:
        """Take the lock if it is free."""
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            holder.bind(self._address)
        except OSError as error:
            holder.close()
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        self._socket = holder
        return True

    def release(self) -> None:
        """Give the lock back."""
        assert self._socket is not None
        self._socket.close()
        self._socket = None
