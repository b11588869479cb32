"""The order of admission against a slow model of it, and the bound on what tenants that keep waiting may get apart."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagedcore.engine.fair_queue import MAX_IDLE_TENANTS, OUTPUT_TOKEN_WEIGHT, FairQueue
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.sequence_group import SequenceGroup
from pagedcore.engine.waiting_queue import WaitingQueue


def make_group(number: int, tenant: str = "", num_tokens: int = 1, priority: int = 0) -> SequenceGroup:
    params = SamplingParams(tenant=tenant, priority=priority)
    return SequenceGroup(Sequence(number, Request(str(number), [0] * num_tokens, params), 100, frozenset(), number))


@dataclass
class ModelOfAPriority:
    """What `FairQueue` does, without its heaps: everything is looked at every time."""

    waiting: list[SequenceGroup] = field(default_factory=list)
    running: list[SequenceGroup] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    time: int = 0

    def add(self, group: SequenceGroup) -> None:
        if self.waiting:
            self.time = max(self.time, min(self.served[other.tenant] for other in self.waiting))
        if all(other.tenant != group.tenant for other in self.waiting):
            self.served[group.tenant] = max(self.served[group.tenant], self.time)
        self.waiting.append(group)

    def next(self) -> SequenceGroup:
        firsts = {group.tenant: group for group in reversed(self.waiting)}.values()
        return min(firsts, key=lambda group: (self.served[group.tenant], group.arrival))

    def admit(self, group: SequenceGroup, num_tokens: int) -> None:
        self.time = max(self.time, self.served[group.tenant])
        self.served[group.tenant] += num_tokens
        self.waiting.remove(group)
        self.running.append(group)


class OrderMachine(RuleBasedStateMachine):
    """Queues, admits, draws for and ends groups in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.model: dict[int, ModelOfAPriority] = {}
        self.numbers = itertools.count()

    def groups(self, *, running: bool) -> list[SequenceGroup]:
        return [group for model in self.model.values() for group in (model.running if running else model.waiting)]

    @rule(tenant=st.sampled_from("abc"), priority=st.sampled_from((-1, 0, 3)), num_tokens=st.integers(1, 9))
    def add(self, tenant: str, priority: int, num_tokens: int) -> None:
        group = make_group(next(self.numbers), tenant, num_tokens, priority)
        self.queue.add(group)
        self.model.setdefault(priority, ModelOfAPriority()).add(group)

    @precondition(lambda self: self.groups(running=False))
    @rule(num_cached=st.integers(0, 9))
    def admit(self, num_cached: int) -> None:
        model = self.model[min(priority for priority, model in self.model.items() if model.waiting)]
        group = model.next()
        assert self.queue.peek() is group
        num_tokens = max(1, group.num_prompt_tokens - num_cached)
        self.queue.admit(group, num_tokens)
        model.admit(group, num_tokens)

    @precondition(lambda self: self.groups(running=True))
    @rule(data=st.data())
    def draw(self, data: st.DataObject) -> None:
        drawing = data.draw(st.lists(st.sampled_from(self.groups(running=True)), unique=True))
        idle = [group for group in self.groups(running=True) if group not in drawing]
        sequences = [group.lead for group in (*drawing, *idle)]
        self.queue.charge_draws(sequences, [True] * len(drawing) + [False] * len(idle))
        for group in drawing:
            self.model[group.priority].served[group.tenant] += OUTPUT_TOKEN_WEIGHT

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.groups(running=True) + self.groups(running=False)))
        model = self.model[group.priority]
        waits = group in model.waiting
        self.queue.close(group, waits=waits)
        (model.waiting if waits else model.running).remove(group)
        if not model.waiting and not model.running:
            del self.model[group.priority]

    @invariant()
    def counts_agree(self) -> None:
        waiting = self.groups(running=False)
        assert len(self.queue) == len(waiting)
        assert self.queue.num_tokens == sum(group.num_prompt_tokens for group in waiting)
        assert (self.queue.peek() is None) == (not waiting)
        for model in self.model.values():
            if len({group.tenant for group in (*model.waiting, *model.running)}) > 1:
                assert self.queue.is_shared


TestOrder = OrderMachine.TestCase
TestOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_what_tenants_that_keep_waiting_get_differs_by_a_bounded_number_of_tokens(seed: int) -> None:
    """Theorem 4.4 of the Virtual Token Counter's paper, for a tenant that floods and others that just keep waiting."""
    rng = random.Random(seed)
    num_rows, longest_prompt, longest_output = 6, 40, 30
    queue, numbers = WaitingQueue(), itertools.count()
    joins_at = {"flood": 0, "steady": 0, "late": 150}
    served: dict[str, int] = dict.fromkeys(joins_at, 0)
    served_before_the_late_one = dict(served)
    running: dict[SequenceGroup, int] = {}  # outputs to come
    bound = 2 * max(longest_prompt, OUTPUT_TOKEN_WEIGHT * num_rows * longest_output)
    for step in range(1000):
        for tenant, joins in joins_at.items():
            waiting = sum(group.tenant == tenant for group in queued(queue))
            for _ in range(max(0, (40 if tenant == "flood" else num_rows) - waiting) if step >= joins else 0):
                queue.add(make_group(next(numbers), tenant, rng.randint(1, longest_prompt)))
        while len(running) < num_rows and (group := queue.peek()) is not None:
            queue.admit(group, group.num_prompt_tokens)
            served[group.tenant] += group.num_prompt_tokens
            # The flood's requests are the long ones, too.
            running[group] = rng.randint(20 if group.tenant == "flood" else 1, longest_output)
        queue.charge_draws([group.lead for group in running], [True] * len(running))
        for group in list(running):
            served[group.tenant] += OUTPUT_TOKEN_WEIGHT
            running[group] -= 1
            if running[group] == 0:
                del running[group]
                queue.close(group, waits=False)
        if step == joins_at["late"] - 1:
            served_before_the_late_one = dict(served)
        assert abs(served["flood"] - served["steady"]) <= bound
        if step >= joins_at["late"]:
            since = {tenant: served[tenant] - served_before_the_late_one[tenant] for tenant in served}
            assert max(since.values()) - min(since.values()) <= bound
    assert min(served.values()) > 5 * bound, "the run was long enough for the bound to mean something"


def test_priorities_that_nobody_has_any_more_are_forgotten() -> None:
    queue = WaitingQueue()
    first, later = make_group(0, priority=-5), make_group(1, priority=7)
    queue.add(first)
    queue.add(later)
    for number in range(2, 1000):
        group = make_group(number, priority=number)
        queue.add(group)
        queue.close(group, waits=True)
    assert len(queue._priorities) == len(queue._in_heap) <= 4
    assert queue.peek() is first
    queue.close(first, waits=True)
    assert queue.peek() is later


def queued(queue: WaitingQueue) -> list[SequenceGroup]:
    return [
        group for fair in queue._queues.values() for account in fair._accounts.values() for group in account.waiting
    ]


def test_pauses_gain_nothing() -> None:
    """A tenant that has got more than the others does not start anew by having nothing open for a moment."""
    queue = FairQueue()
    numbers = itertools.count()
    greedy = make_group(next(numbers), "greedy", 1000)
    others = [make_group(next(numbers), "other") for _ in range(2)]
    for group in (greedy, *others):
        queue.add(group)
    queue.admit(greedy, 1000)
    queue.close(greedy)
    again = make_group(next(numbers), "greedy")
    queue.add(again)
    for group in others:
        assert queue.peek() is group
        queue.admit(group, 1)
    assert queue.peek() is again


def test_no_more_than_so_many_idle_tenants_are_remembered() -> None:
    queue = FairQueue()
    numbers = itertools.count()
    queue.add(make_group(next(numbers), "waits"))
    for number in range(3 * MAX_IDLE_TENANTS):
        group = make_group(next(numbers), f"tenant {number}", 10)
        queue.add(group)
        queue.admit(group, 10)
        queue.close(group)
    assert queue.num_tenants == MAX_IDLE_TENANTS + 1
