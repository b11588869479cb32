"""The order in which requests that have not begun are admitted: by priority, then fairly between tenants, then by arrival."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from pagedcore.engine.fair_queue import FairQueue
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.sequence_group import SequenceGroup


class WaitingQueue:
    """Owns the groups that wait to be admitted for the first time, and the accounts of all unfinished groups' tenants.

    Lower priorities go first, without regard to how long others have waited. Within a priority, a `FairQueue` decides.
    No operation takes longer than the logarithm of the number of priorities and tenants in use.
    """

    def __init__(self) -> None:
        self.num_tokens = 0  # of the prompts that wait
        self._length = 0
        self._queues: dict[int, FairQueue] = {}
        self._shared: set[int] = set()  # priorities at which several tenants have accounts
        self._priorities: list[int] = []  # heap of those that may have waiting groups
        self._in_heap: set[int] = set()

    def __len__(self) -> int:
        return self._length

    @property
    def is_shared(self) -> bool:
        """Whether tenants of equal priority compete, so that it matters what each of them gets."""
        return bool(self._shared)

    def add(self, group: SequenceGroup) -> None:
        """Queue a new group."""
        queue = self._queues.get(group.priority)
        if queue is None:
            queue = self._queues[group.priority] = FairQueue()
        if group.priority not in self._in_heap:
            self._in_heap.add(group.priority)
            heapq.heappush(self._priorities, group.priority)
        group.account = queue.add(group)
        self._length += 1
        self.num_tokens += group.num_prompt_tokens
        self._note_tenants(group.priority, queue)

    def peek(self) -> SequenceGroup | None:
        """The group to admit next; None when no group waits."""
        while self._priorities:
            queue = self._queues.get(self._priorities[0])
            group = None if queue is None else queue.peek()
            if group is not None:
                return group
            self._in_heap.remove(heapq.heappop(self._priorities))
        return None

    def admit(self, group: SequenceGroup, num_tokens: int) -> None:
        """Take out a group that begins to be computed; `num_tokens` of its prompt are (the rest was cached)."""
        queue = self._queues[group.priority]
        queue.admit(group, num_tokens)
        self._length -= 1
        self.num_tokens -= group.num_prompt_tokens
        self._note_tenants(group.priority, queue)

    def charge_draws(self, sequences: Iterable[Sequence], samples: Iterable[bool]) -> None:
        """Charge the tenants for the rows of a step that draw a token. Where none compete, that can be left out."""
        for sequence, draws in zip(sequences, samples, strict=True):
            if draws:
                sequence.group.account.charge_draw()

    def close(self, group: SequenceGroup, *, waits: bool) -> None:
        """Forget a group that has ended; `waits`: it has never been admitted."""
        queue = self._queues[group.priority]
        queue.close(group)
        if waits:
            self._length -= 1
            self.num_tokens -= group.num_prompt_tokens
        self._note_tenants(group.priority, queue)
        if queue.num_open == 0:
            del self._queues[group.priority]
            if len(self._priorities) > 2 * len(self._queues):
                self._in_heap.intersection_update(self._queues)
                self._priorities = sorted(self._in_heap)  # a sorted list is a heap

    def _note_tenants(self, priority: int, queue: FairQueue) -> None:
        if queue.num_open > 0 and queue.num_tenants > 1:
            self._shared.add(priority)
        else:
            self._shared.discard(priority)
