"""Runs a scenario: the real engine, from its inbox to its block manager, in a simulated world."""

from __future__ import annotations

from dataclasses import dataclass

from pagedcore.engine.clock import Clock
from pagedcore.engine.deadlines import Deadline
from pagedcore.engine.engine import MAX_FAILED_STEPS, Engine, EngineLimits
from pagedcore.engine.engine_thread import EngineThread
from pagedcore.engine.queue_limits import QueueLimits
from pagedcore.engine.request import Request
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.telemetry import Recorder
from pagedcore.errors import EngineDeadError, OverloadedError, RequestError
from tests.simulation.client import Client
from tests.simulation.failure import require
from tests.simulation.fake_model import EOS, VOCAB_SIZE
from tests.simulation.invariants import Invariants
from tests.simulation.scenario import (
    STEP_SECONDS,
    Arrival,
    Cancel,
    ClockJump,
    Fault,
    NoRoom,
    Scenario,
    Setup,
    Shutdown,
    StopBeforeSwap,
    StopString,
    TimedEvent,
)
from tests.simulation.simulated_executor import ExecutorFaults, SimulatedExecutor
from tests.simulation.watched_blocks import WatchedBlocks

MAX_TURNS = 3000  # of the engine's loop; scenarios that end take some tens
MAX_IDLE_TURNS = 5  # in a row: a group may wait for its own draw, or be brought back from the host before it has rows


@dataclass(frozen=True)
class Summary:
    """What a clean simulation went through."""

    num_steps: int
    num_requests: int
    num_preemptions: int
    num_swapped_blocks: int
    num_prefix_hits: int


class Simulation:
    """One run of a scenario. The clock stands still but for steps, for jumps, and for waits while nothing is to be done.

    Events come between two turns of the engine's loop, or while a step is running, as threads of clients would have it.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.now = 0.0
        self._setup = setup = scenario.setup
        events = scenario.events
        self._events = sorted((e for e in events if isinstance(e, TimedEvent)), key=lambda event: event.at)
        self._stops_before_swaps = [event for event in events if isinstance(event, StopBeforeSwap)]
        self._num_pending_swaps = 0  # turns that left copies to a later one
        self._no_room = [fault for fault in events if isinstance(fault, NoRoom)]
        self._faults = ExecutorFaults.of(fault for fault in events if isinstance(fault, Fault))
        self._blocks = WatchedBlocks(
            setup.num_blocks,
            setup.block_size,
            num_host_blocks=setup.num_host_blocks,
            enable_prefix_caching=setup.enable_prefix_caching,
            hash_bits=setup.hash_bits,
        )
        self._executor = SimulatedExecutor(setup, self._blocks, self._pass_step)
        self._recorder = Recorder()
        self._scheduler = _make_scheduler(setup, self._blocks, self._executor, self._recorder, self._clock)
        limits = EngineLimits(setup.max_model_len, VOCAB_SIZE, VOCAB_SIZE, frozenset({EOS}))
        self._engine = Engine(self._scheduler, self._executor, limits, one_step_ahead=setup.one_step_ahead)
        queue_limits = QueueLimits(setup.max_queue_size, setup.max_queue_tokens)
        self._thread = EngineThread(self._engine, queue_limits, self._recorder, self._clock)
        self._clients: list[Client] = []
        self._open: dict[str, Client] = {}
        self._has_begun = False
        self._is_closed = False

    def run(self) -> Summary:
        """Run to the end. Raises what the simulation finds, whatever that is."""
        self._begin()
        invariants = Invariants(self._scheduler, self._blocks, self._setup)
        num_idle = 0
        for _ in range(MAX_TURNS):
            before, num_launched, num_refused = self.now, self._executor.num_launched, self._blocks.num_refused
            num_swaps = self._blocks.num_swaps
            known = [*self._open.values()]
            waiting = [client for client in known if not client.is_admitted]
            due = [client.what_is_due() for client in known]
            if not self._turn() and not self._wait_for_next_event():
                break
            if self._is_closed:
                return self._end_closed()
            invariants.check()
            self._check_admissions(waiting)
            self._check_books(known)
            for item in due:
                item.client.check_due(item)
            is_idle = self._executor.num_launched == num_launched and self._blocks.num_refused == num_refused
            num_idle = num_idle + 1 if is_idle and self._engine.has_work() else 0
            require(num_idle <= MAX_IDLE_TURNS, "there is work, and no step")
            if self._executor.num_launched == num_launched and self._blocks.num_swaps > num_swaps:
                self._stop_before_swap()
            if self.now == before:
                self._pass(STEP_SECONDS)
        else:
            require(False, f"requests are still open after {MAX_TURNS} turns")
        require(not self._open, f"{[*self._open]} have no last output")
        invariants.check_at_rest()
        self._check_records()
        return self._summary()

    def _begin(self) -> None:
        for prefix in self._setup.pinned_prefixes:
            self._engine.pin_prefix(list(prefix))
        self._recorder.take()
        self._blocks.arm(self._no_room)
        self._executor.arm(self._faults)
        self._has_begun = True

    # ------------------------------------------------------------------ the world

    def _clock(self) -> float:
        return self.now

    def _pass_step(self) -> None:
        if self._has_begun:
            self._pass(STEP_SECONDS)

    def _pass(self, seconds: float) -> None:
        """Let time go by, and happen what happens meanwhile."""
        end = self.now + seconds
        while self._events and self._events[0].at <= end:
            event = self._events.pop(0)
            self.now = max(self.now, event.at)
            self._thread.expire_due()
            self._happen(event)
        self.now = max(self.now, end)
        self._thread.expire_due()
        self._drop_finished()

    def _stop_before_swap(self) -> None:
        for event in self._stops_before_swaps:
            if event.number == self._num_pending_swaps:
                self._stop(event.request_id, event.index)
        self._num_pending_swaps += 1

    def _turn(self) -> bool:
        try:
            has_worked = self._thread.turn()
        except EngineDeadError as error:
            require(self._faults.num_failures >= MAX_FAILED_STEPS, f"the engine ended by itself: {error}")
            self._close(error)
            return True
        self._drop_finished()
        return has_worked

    def _wait_for_next_event(self) -> bool:
        """The engine has nothing to do; False: nor will it ever have."""
        require(not self._open, f"the engine has nothing to do, and {[*self._open]} are open")
        if not self._events:
            return False
        self._pass(max(self._events[0].at - self.now, 0.0))
        return True

    def _happen(self, event: TimedEvent) -> None:
        self._drop_finished()
        if isinstance(event, Arrival):
            self._arrive(event)
        elif isinstance(event, Cancel):
            self._thread.abort(event.request_id)
            if event.request_id in self._open:
                self._open[event.request_id].cancel()
        elif isinstance(event, StopString):
            self._stop(event.request_id, event.index)
        elif isinstance(event, ClockJump):
            self.now += event.seconds
            self._thread.expire_due()
        elif isinstance(event, Shutdown):
            self._close(None)

    def _stop(self, request_id: str, index: int) -> None:
        self._thread.end_sequence(request_id, index)
        if request_id in self._open:
            self._open[request_id].stop(index)

    def _arrive(self, event: Arrival) -> None:
        deadline = None if event.timeout is None else Deadline(event.timeout, self.now)
        request = Request(
            event.request_id,
            list(event.prompt),
            event.params,
            event.cache_salt,
            deadline=deadline,
            arrived_at=self.now,
        )
        client = Client(
            request,
            self._setup.max_model_len,
            self._clock,
            may_fail=bool(self._faults.num_failures or self._faults.bad_rows),
            shares_prefixes=self._shares_prefixes,
        )
        try:
            self._thread.submit(request, client)
        except RequestError as error:
            is_in_use = event.request_id in self._open or event.request_id in self._ids_of_late_ones()
            require(is_in_use or not self._must_fit(event), f"{event.request_id} was refused: {error}")
        except OverloadedError:
            limited = self._setup.max_queue_size or self._setup.max_queue_tokens
            require(bool(limited) and bool(self._open), f"{event.request_id} was refused by an empty queue")
        except EngineDeadError:
            require(self._is_closed, f"{event.request_id} hears that the engine has ended")
        else:
            require(event.request_id not in self._open, f"{event.request_id} is in use twice")
            require(not self._is_closed, f"{event.request_id} was taken by a closed engine")
            self._open[event.request_id] = client
            self._clients.append(client)

    def _shares_prefixes(self, request: Request) -> bool:
        is_pinned = bool(self._setup.pinned_prefixes) and not request.cache_salt
        others = [client.request for client in self._clients if client.request is not request]
        return is_pinned or any(other.cache_salt == request.cache_salt for other in others)

    def _ids_of_late_ones(self) -> set[str]:
        """Ids that the engine may not have let go of yet, as it has not been told."""
        return {client.request.request_id for client in self._clients if client.request.deadline is not None}

    def _must_fit(self, event: Arrival) -> bool:
        """Whether a request cannot be refused, by an estimate that errs on the small side."""
        params, setup = event.params, self._setup
        assert params.max_tokens is not None
        longest = min(len(event.prompt) + params.max_tokens, setup.max_model_len)
        num_blocks = params.num_sequences * -(-longest // setup.block_size)
        num_pinned = sum(-(-len(prefix) // setup.block_size) for prefix in setup.pinned_prefixes)
        return num_blocks <= setup.num_blocks - num_pinned

    def _close(self, error: Exception | None) -> None:
        self._is_closed = True
        for client in self._open.values():
            client.engine_has_ended = True
        self._thread.close(error)

    def _drop_finished(self) -> None:
        for name in [name for name, client in self._open.items() if client.is_finished]:
            del self._open[name]

    # ------------------------------------------------------------------ what is looked at

    def _check_admissions(self, waited: list[Client]) -> None:
        """Nobody is admitted before one who waited and is more urgent, or is of the same tenant and came first."""
        admitted: list[Client] = []
        for group in (*self._scheduler.running, *self._scheduler.preempted):
            client = self._open.get(group.request_id)
            if client is not None and not client.is_admitted:
                client.is_admitted = True
                admitted.append(client)
        left = [client for client in waited if not client.is_admitted and not client.is_finished]
        for client in admitted:
            params = client.request.sampling_params
            for other in left:
                its = other.request.sampling_params
                came_first = waited.index(other) < waited.index(client) if client in waited else False
                is_before = its.priority < params.priority or (
                    (its.priority, its.tenant) == (params.priority, params.tenant) and came_first
                )
                require(not is_before, f"{client.request.request_id} overtook {other.request.request_id}")

    def _check_books(self, known: list[Client]) -> None:
        """The engine has the requests that were open before the turn and still are, and no others; none of them is late."""
        scheduler = self._scheduler
        num_open = sum(not client.is_finished for client in known)
        num_known = len(scheduler.running) + len(scheduler.waiting) + len(scheduler.preempted)
        require(num_open <= num_known, f"{num_open} requests are open, the engine has {num_known}")
        names = {client.request.request_id for client in known}
        for group in (*scheduler.running, *scheduler.preempted):
            require(group.request_id in names, f"{group.request_id} has ended, and the engine goes on with it")
        for client in self._open.values():
            deadline = client.request.deadline
            require(deadline is None or deadline.at > self.now, f"{client.request.request_id} is late, and goes on")

    def _check_records(self) -> None:
        """Every request has one record, with its times in order."""
        stats, records = self._thread.stats(), self._recorder.take()
        num_ended = sum(stats.finished_total.values()) - len(self._setup.pinned_prefixes)
        require(len(records.requests) == num_ended, "a request has no record, or two")
        for record in records.requests:
            times = (record.arrived_at, record.scheduled_at, record.first_token_at, record.last_token_at)
            known = [at for at in (*times, record.ended_at) if at is not None]
            require(known == sorted(known), f"a request's times are out of order: {known}")

    def _end_closed(self) -> Summary:
        self._drop_finished()
        require(not self._open, f"{[*self._open]} were not told that the engine has ended")
        return self._summary()

    def _summary(self) -> Summary:
        stats = self._scheduler.stats()
        return Summary(
            self._executor.num_launched,
            len(self._clients),
            stats.preemptions_total,
            stats.swapped_in_blocks_total,
            stats.prefix_cache_hits_total,
        )


def _make_scheduler(
    setup: Setup, blocks: WatchedBlocks, executor: SimulatedExecutor, recorder: Recorder, clock: Clock
) -> Scheduler:
    config = SchedulerConfig(
        setup.max_num_seqs,
        setup.max_num_batched_tokens,
        setup.enable_prefix_caching,
        setup.enable_chunked_prefill,
        setup.step_sizes,
        setup.preemption_mode,
        setup.swap_cost_tokens,
    )
    return Scheduler(config, blocks, executor.step_buffers(), recorder=recorder, clock=clock)


def simulate(scenario: Scenario) -> Summary:
    """Run a scenario; raises what is found, whatever that is."""
    return Simulation(scenario).run()
