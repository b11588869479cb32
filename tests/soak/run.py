"""The course of a soak: warm up, look, go on for long, look again. And of an overload: more than the server can take."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

from pagedcore.serve.triton_server import TritonServer
from tests.soak.client import Clients, Outcome, Reply
from tests.soak.traffic import LENGTH_SCALE, Ends, SoakRequest, Traffic
from tests.soak.watch import Sample, idle_sample, sample

WARM_UP = 0.03  # share of the requests, before the first look
MIN_WARM_UP = 200
PEAK_SECONDS = 30.0
SAMPLE_SECONDS = 2.0


@dataclass(frozen=True)
class Told:
    """A request that was answered as a whole: when it ended, and the seconds to its first and last response."""

    at: float
    first: float
    last: float


@dataclass(frozen=True)
class Overload:
    """Requests answered a second: at full load, and when twice as many come."""

    peak: float
    goodput: float


class Soak:
    """One soak of one server; what it finds is in its fields."""

    def __init__(self, server: TritonServer, num_clients: int, seed: int, length_scale: int = LENGTH_SCALE) -> None:
        self.faults: list[str] = []
        self.outcomes: Counter[Outcome] = Counter()
        self.told: list[Told] = []
        self.samples: list[tuple[float, Sample]] = []
        self.before: Sample | None = None
        self.after: Sample | None = None
        self.seconds = 0.0
        self.num_canaries = 0
        self.overloads: dict[str, Overload] = {}
        self._server = server
        self._num_clients = num_clients
        self._traffic = Traffic(seed, length_scale)
        self._canaries: dict[str, str] = {}
        self._begin = 0.0

    async def run(self, num_requests: int, seconds: float = 0.0) -> None:
        """Mixed traffic, so many requests or, if not 0, seconds, and a look at what it leaves; `faults` says what went wrong."""
        clients = Clients(self._server)
        # By twice as many clients: what grows to its highest use and stays there, as shared memory does, has grown then.
        warm_up = max(int(WARM_UP * num_requests), MIN_WARM_UP)
        await self._keep_busy(clients, warm_up, 2 * self._num_clients)
        self.before = await asyncio.to_thread(idle_sample, self._server)
        self.outcomes.clear()
        self.told.clear()
        self._begin = time.monotonic()
        watching = asyncio.create_task(self._watch())
        await self._keep_busy(clients, num_requests, self._num_clients, seconds)
        self.seconds = time.monotonic() - self._begin
        watching.cancel()
        self.after = await asyncio.to_thread(idle_sample, self._server, self.before)
        self.faults += leftovers(self.before, self.after)
        await clients.close()

    async def _keep_busy(self, clients: Clients, num_requests: int, num_at_once: int, seconds: float = 0.0) -> None:
        """So many requests, or for so many seconds, a fixed number of them at a time."""
        deadline = time.monotonic() + seconds
        left = iter(lambda: time.monotonic() < deadline, False) if seconds else iter(range(num_requests))

        async def client() -> None:
            for _ in left:
                await self._ask(clients, self._traffic.next())

        await asyncio.gather(*(client() for _ in range(num_at_once)))

    async def _ask(self, clients: Clients, request: SoakRequest) -> Reply:
        reply = await clients.send(request)
        self.outcomes[reply.outcome] += 1
        if reply.outcome is Outcome.WRONG:
            self.faults.append(reply.why)
        elif reply.outcome is Outcome.ANSWERED:
            self.told.append(Told(time.monotonic() - self._begin, reply.first, reply.last))
            if request.ends is Ends.CANARY:
                self.num_canaries += 1
                if self._canaries.setdefault(request.canary, reply.text) != reply.text:
                    self.faults.append(f"canary {request.canary!r} said {reply.text!r}")
        return reply

    async def _watch(self) -> None:
        while True:
            now = await asyncio.to_thread(sample, self._server)
            self.samples.append((time.monotonic() - self._begin, now))
            done = sum(self.outcomes.values())
            print(f"{self.samples[-1][0]:.0f} s, {done} requests, {now}", flush=True)
            await asyncio.sleep(SAMPLE_SECONDS)

    async def overload(self, seconds: float) -> Overload:
        """Full load by as many clients as there are, then new requests at twice the rate that it answered, come what may."""
        clients = Clients(self._server)
        await self._keep_busy(clients, MIN_WARM_UP, self._num_clients)
        before, deadline = self.outcomes[Outcome.ANSWERED], time.monotonic() + PEAK_SECONDS

        async def client() -> None:
            while time.monotonic() < deadline:
                await self._ask(clients, self._traffic.next())

        await asyncio.gather(*(client() for _ in range(self._num_clients)))
        peak = (self.outcomes[Outcome.ANSWERED] - before) / PEAK_SECONDS
        before, begin = self.outcomes[Outcome.ANSWERED], time.monotonic()
        tasks: set[asyncio.Task[Reply]] = set()
        while (elapsed := time.monotonic() - begin) < seconds:
            while len(tasks) < 2 * peak * elapsed:
                tasks.add(asyncio.create_task(self._ask(clients, self._traffic.next())))
            await asyncio.sleep(0.005)
        goodput = (self.outcomes[Outcome.ANSWERED] - before) / seconds
        await asyncio.gather(*tasks)
        await clients.close()
        return Overload(peak, goodput)


def leftovers(before: Sample, after: Sample) -> list[str]:
    """What is left of the requests between two idle moments, a line each."""
    found = [] if after.is_idle else [f"not idle at the end: {after}"]
    for name in ("num_model_threads", "num_files", "num_regions", "region_mib", "device_mib"):
        if getattr(after, name) > getattr(before, name):
            found.append(f"{name} grew from {getattr(before, name)} to {getattr(after, name)}")
    return found
