"""Shares admission between tenants by the tokens they got: start-time fair queueing in virtual time.

The counters are those of the Virtual Token Counter (Sheng et al., OSDI 2024, algorithm 2): a prompt token counts 1, an output
token 2, a tenant that begins to wait is lifted to the least counter of those that wait already, and the least counter goes first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict

from pagedcore.engine.sequence_group import SequenceGroup

OUTPUT_TOKEN_WEIGHT = 2  # section 5.1 of the paper: an output token costs a row of a step, prompt tokens share one
MAX_IDLE_TENANTS = 1024  # that are remembered for what they got beyond the others


class TenantAccount:
    """What one tenant got and what it waits for.

    `virtual_time`: weighted tokens; it only grows. `waiting`: in order of arrival. `num_open`: unfinished groups, those
    that wait among them.
    """

    __slots__ = ("is_in_heap", "is_remembered", "num_open", "tenant", "virtual_time", "waiting")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.virtual_time = 0
        self.waiting: OrderedDict[SequenceGroup, None] = OrderedDict()
        self.num_open = 0
        self.is_in_heap = False
        self.is_remembered = False

    def charge_draw(self) -> None:
        """Count a row that draws a token."""
        self.virtual_time += OUTPUT_TOKEN_WEIGHT

    def first(self) -> SequenceGroup:
        return next(iter(self.waiting))


class FairQueue:
    """Owns the accounts of the tenants that have unfinished groups of one priority. Operations take O(log tenants).

    First come, first served within a tenant, and between tenants of equal virtual time. Between two tenants that both keep
    waiting, the tokens they got differ by a bounded number, however many requests one of them sends (theorem 4.4 of the
    paper). An idle tenant gains nothing by its idleness. It is remembered while it has got more than the others, up to
    MAX_IDLE_TENANTS of them, so that pauses do not pay either.
    """

    def __init__(self) -> None:
        self.num_open = 0
        self._accounts: dict[str, TenantAccount] = {}
        # Keys are too small where a tenant's virtual time has grown meanwhile; that is mended when they come up.
        self._heap: list[tuple[int, int, TenantAccount]] = []
        self._remembered: list[tuple[int, str]] = []
        self._virtual_time = 0  # of the group admitted last

    @property
    def num_tenants(self) -> int:
        """Tenants with an account, those that are idle and remembered among them."""
        return len(self._accounts)

    def add(self, group: SequenceGroup) -> TenantAccount:
        """Queue a group; returns the account of its tenant."""
        account = self._accounts.get(group.tenant)
        if account is None:
            account = self._accounts[group.tenant] = TenantAccount(group.tenant)
        if not account.waiting:
            account.virtual_time = max(account.virtual_time, self._time())
        account.waiting[group] = None
        account.num_open += 1
        self.num_open += 1
        if not account.is_in_heap:
            account.is_in_heap = True
            heapq.heappush(self._heap, (account.virtual_time, group.arrival, account))
        return account

    def peek(self) -> SequenceGroup | None:
        """The group whose turn it is; None when no group waits."""
        account = self._first_account()
        return None if account is None else account.first()

    def admit(self, group: SequenceGroup, num_tokens: int) -> None:
        """Take a waiting group out to be computed, and charge its tenant for `num_tokens` of its prompt."""
        account = self._accounts[group.tenant]
        self._virtual_time = max(self._virtual_time, account.virtual_time)
        del account.waiting[group]
        account.virtual_time += num_tokens
        self._forget_those_behind()

    def close(self, group: SequenceGroup) -> None:
        """Forget a group that has ended, waiting or not."""
        account = self._accounts[group.tenant]
        account.waiting.pop(group, None)
        account.num_open -= 1
        self.num_open -= 1
        if account.num_open == 0 and not account.is_remembered:
            account.is_remembered = True
            heapq.heappush(self._remembered, (account.virtual_time, account.tenant))
            self._forget_those_behind()

    def _first_account(self) -> TenantAccount | None:
        while self._heap:
            virtual_time, arrival, account = self._heap[0]
            if not account.waiting:
                heapq.heappop(self._heap)
                account.is_in_heap = False
                continue
            now_due = (account.virtual_time, account.first().arrival)
            if now_due == (virtual_time, arrival):
                return account
            heapq.heapreplace(self._heap, (*now_due, account))
        return None

    def _time(self) -> int:
        """The virtual time to which a tenant that begins to wait is lifted."""
        account = self._first_account()
        if account is not None:
            self._virtual_time = max(self._virtual_time, account.virtual_time)
        return self._virtual_time

    def _forget_those_behind(self) -> None:
        """Drop idle tenants that would be lifted anyway, and the least of those that are too many."""
        while self._remembered:
            virtual_time, tenant = self._remembered[0]
            if virtual_time > self._virtual_time and len(self._remembered) <= MAX_IDLE_TENANTS:
                return
            account = self._accounts[tenant]
            if account.num_open == 0 and account.virtual_time > virtual_time:  # it was back meanwhile
                heapq.heapreplace(self._remembered, (account.virtual_time, tenant))
                continue
            heapq.heappop(self._remembered)
            account.is_remembered = False
            if account.num_open == 0:
                del self._accounts[tenant]
