"""How many requests may wait, and why one was not taken."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pagedcore.errors import OverloadedError


class RefusalReason(Enum):
    """Why the engine did not take a request."""

    INVALID = "invalid"  # it could not be served as asked, or never fit
    QUEUE_SIZE = "queue_size"
    QUEUE_TOKENS = "queue_tokens"
    STOPPED = "stopped"  # the engine has ended or is about to


@dataclass(frozen=True)
class QueueLimits:
    """Bounds of the requests that wait to be admitted; 0: no bound, as Triton has it. A request is always taken when none waits.

    max_queue_size: requests
    max_queue_tokens: prompt tokens of these requests together
    """

    max_queue_size: int = 0
    max_queue_tokens: int = 0

    def refusal(self, num_waiting: int, num_waiting_tokens: int, num_tokens: int) -> RefusalReason | None:
        """Which bound a request with a prompt of `num_tokens` would exceed; None if it may be queued."""
        if num_waiting == 0:
            return None
        if 0 < self.max_queue_size <= num_waiting:
            return RefusalReason.QUEUE_SIZE
        if 0 < self.max_queue_tokens < num_waiting_tokens + num_tokens:
            return RefusalReason.QUEUE_TOKENS
        return None

    def error(
        self, reason: RefusalReason, num_waiting: int, num_waiting_tokens: int, num_tokens: int
    ) -> OverloadedError:
        """What to tell the client of a request that exceeds a bound."""
        if reason is RefusalReason.QUEUE_SIZE:
            detail = f"{num_waiting} requests are waiting, and max_queue_size is {self.max_queue_size}"
        else:
            detail = (
                f"requests with {num_waiting_tokens} prompt tokens are waiting, this one has {num_tokens}, and "
                f"max_queue_tokens is {self.max_queue_tokens}"
            )
        return OverloadedError(f"the queue is full: {detail}; try again later")
