"""What happens in one simulation: an engine's set-up and a list of events, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.step_sizes import NO_PADDING, StepSizes
from pagedcore.engine.swap_space import PreemptionMode
from tests.simulation.fake_model import EOS

ALPHABET = (1, 2, 3)  # of prompts: so few that many begin alike
STEP_SECONDS = 1.0  # what a step takes by the simulated clock


@dataclass(frozen=True)
class Setup:
    """The engine. `pinned_prefixes` are pinned before the first event; the other fields are those of the engine's parts."""

    block_size: int
    num_blocks: int
    num_host_blocks: int
    hash_bits: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    step_sizes: StepSizes
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    preemption_mode: PreemptionMode
    swap_cost_tokens: float
    one_step_ahead: bool
    launches_eagerly: bool  # whether the executor does a step's work at its launch, or when its result is wanted
    max_queue_size: int
    max_queue_tokens: int
    pinned_prefixes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Arrival:
    """A client sends a request; `timeout` in seconds, None: no deadline. An id that is in use or was is allowed."""

    at: float
    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    cache_salt: str = ""
    timeout: float | None = None


@dataclass(frozen=True)
class Cancel:
    """A client goes away; its request may have ended, or never been."""

    at: float
    request_id: str


@dataclass(frozen=True)
class StopString:
    """A stop string was found in the text of one sequence."""

    at: float
    request_id: str
    index: int


@dataclass(frozen=True)
class StopBeforeSwap:
    """A stop string, found while blocks wait for a step to copy them to the host or back, for the `number`-th time, from 0 on."""

    number: int
    request_id: str
    index: int


@dataclass(frozen=True)
class ClockJump:
    """The machine was suspended, or something took very long."""

    at: float
    seconds: float


@dataclass(frozen=True)
class Shutdown:
    """The engine is closed, whatever is under way."""

    at: float


@dataclass(frozen=True)
class StepFailure:
    """The executor raises in a step, after so many of its copies and writes have been done: the rest never happens."""

    step: int
    num_done: int


@dataclass(frozen=True)
class SwapFailure:
    """As StepFailure, in a step that moves blocks between device and host; `number`: of such steps, from 0 on."""

    number: int
    num_done: int


@dataclass(frozen=True)
class BadLogits:
    """In a step, the logits of the rows r with r % modulus == 0 are not finite."""

    step: int
    modulus: int


@dataclass(frozen=True)
class NoRoom:
    """The block manager finds no room from its `first` request for blocks on, `count` times, though there may be some."""

    first: int
    count: int


TimedEvent: TypeAlias = Arrival | Cancel | StopString | ClockJump | Shutdown
Fault: TypeAlias = StepFailure | SwapFailure | BadLogits | NoRoom
Event: TypeAlias = TimedEvent | StopBeforeSwap | Fault


@dataclass(frozen=True)
class Scenario:
    seed: int
    setup: Setup
    events: tuple[Event, ...]

    def only(self, kept: frozenset[int]) -> Scenario:
        """The same with some of its events, by their numbers."""
        return replace(self, events=tuple(event for number, event in enumerate(self.events) if number in kept))


def make_scenario(seed: int) -> Scenario:
    """The scenario of a seed, for ever the same one."""
    rng = random.Random(seed)
    setup = _make_setup(rng)
    arrivals = _make_arrivals(rng, setup)
    events: list[Event] = []
    for arrival in arrivals:
        chance = rng.random()
        at = arrival.at + rng.random() * rng.choice((2, 10, 25))
        if chance < 0.25:
            events.append(Cancel(at, arrival.request_id))
        elif chance < 0.35:
            events.append(StopString(at, arrival.request_id, rng.randrange(arrival.params.num_sequences)))
    if rng.random() < 0.1:
        events.append(ClockJump(rng.random() * 15, rng.choice((3.0, 1000.0))))
    if rng.random() < 0.03:
        events.append(Shutdown(rng.random() * 30))
    faults = _make_faults(rng)
    stops = _make_stops_before_swaps(rng, arrivals)
    arrivals = [_asking_of_prompt(rng, arrival) for arrival in arrivals]
    return Scenario(seed, setup, (*arrivals, *events, *faults, *stops))


def _make_setup(rng: random.Random) -> Setup:
    block_size = rng.choice((1, 2, 2, 3, 4, 4, 8))
    max_model_len = rng.randint(8, 24)
    longest = -(-max_model_len // block_size)
    max_num_seqs = rng.choice((1, 2, 3, 4, 6, 8))
    chunked = rng.random() < 0.8
    pinned = [_prompt(rng, rng.randint(1, max_model_len // 2)) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
    num_pinned = sum(-(-len(prefix) // block_size) for prefix in pinned)
    return Setup(
        block_size=block_size,
        num_blocks=longest + num_pinned + rng.randint(0, rng.choice((longest // 2, longest, 2 * longest))),
        num_host_blocks=rng.choice((0, longest, 3 * longest, 6 * longest)),
        hash_bits=rng.choice((64, 2, 5)),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.randint(1, 12) if chunked else max_model_len + rng.randint(0, 8),
        step_sizes=rng.choice((NO_PADDING, StepSizes((2, max_num_seqs + 1), (3, 8), (2, max_num_seqs)))),
        enable_prefix_caching=rng.random() < 0.7,
        enable_chunked_prefill=chunked,
        preemption_mode=rng.choice((*PreemptionMode, PreemptionMode.SWAP)),
        swap_cost_tokens=rng.choice((0.0, 1.0, 2.0)),
        one_step_ahead=rng.random() < 0.75,
        launches_eagerly=rng.random() < 0.2,
        max_queue_size=rng.choice((0, 0, 0, 0, 0, 0, 0, 2)),
        max_queue_tokens=rng.choice((0, 0, 0, 0, 0, 0, 0, 20)),
        pinned_prefixes=tuple(pinned),
    )


def _prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.choices(ALPHABET, k=length))


def _make_arrivals(rng: random.Random, setup: Setup) -> list[Arrival]:
    arrivals: list[Arrival] = []
    shared = _prompt(rng, setup.max_model_len // 2)
    starts = (*setup.pinned_prefixes, shared)
    priorities = rng.choice(((0,), (1, 0, -1), (2, 1, 0, -1, -2)))
    until = rng.choice((0.0, 4.0, 12.0))
    for number in range(rng.randint(2, 9)):
        start = rng.choice(starts)
        start = start[: rng.choice((0, len(start) // 2, len(start)))]
        prompt = (*start, *_prompt(rng, rng.randint(1, setup.max_model_len // 4)))[: setup.max_model_len - 1]
        if arrivals and rng.random() < 0.25:
            prompt = rng.choice(arrivals).prompt
        at = rng.random() * until
        request_id = f"r{number}"
        if arrivals and rng.random() < 0.06:  # a client that tries again, perhaps as soon as it may
            before = rng.choice(arrivals)
            request_id, at = before.request_id, before.at + (before.timeout or 8.0) + rng.random()
        arrivals.append(
            Arrival(
                at=at,
                request_id=request_id,
                prompt=prompt,
                params=_make_params(rng, setup, rng.choice(priorities)),
                cache_salt=rng.choice(("", "", "", "a")),
                timeout=rng.random() * 20 + 0.5 if rng.random() < 0.12 else None,
            )
        )
    return arrivals


def _make_params(rng: random.Random, setup: Setup, priority: int) -> SamplingParams:
    max_width = min(setup.max_num_seqs, 3)
    kind = rng.random()
    own: dict[str, Any] = {"temperature": rng.choice((0.0, 0.8))}
    if kind < 0.15 and max_width > 1:
        width = rng.randint(2, max_width)
        own = {
            "temperature": 0.0,
            "beam_width": width,
            "n": rng.randint(1, width),
            "early_stopping": rng.choice((True, False, "never")),
            "length_penalty": rng.choice((0.0, 1.0, 2.0)),
        }
    elif kind < 0.4:
        own |= {"n": rng.randint(1, max_width), "temperature": 0.8}
        if kind < 0.22:
            own["best_of"] = max_width
    elif kind < 0.45:
        own["logprobs"] = rng.randint(0, 3)
    return _params(
        max_tokens=rng.randint(1, rng.choice((4, 20, 20))),
        seed=rng.randint(1, 3) if rng.random() < 0.9 else 2**64 - 5,
        ignore_eos=rng.random() < 0.7,
        stop_token_ids=rng.choice(((), (), (7, 11))),
        priority=priority,
        tenant=rng.choice(("", "", "b")),
        **own,
    )


def _asking_of_prompt(rng: random.Random, arrival: Arrival) -> Arrival:
    """An arrival that perhaps wants its prompt's log probabilities."""
    wanted = rng.choice((None, None, None, 0, 2))
    if wanted is None or arrival.params.use_beam_search:
        return arrival
    return replace(arrival, params=_with_prompt_logprobs(arrival.params, wanted))


@lru_cache(maxsize=65536)
def _with_prompt_logprobs(params: SamplingParams, wanted: int) -> SamplingParams:
    return replace(params, prompt_logprobs=wanted)


@lru_cache(maxsize=65536)
def _params(**values: Any) -> SamplingParams:
    """Sampling parameters, which are checked at length when they are made, and may be shared."""
    return SamplingParams(**values)


def _make_stops_before_swaps(rng: random.Random, arrivals: list[Arrival]) -> list[StopBeforeSwap]:
    """Perhaps for one sequence each of the requests that have several, at any of the first occasions."""
    if rng.random() < 0.5:
        return []
    wide = [arrival for arrival in arrivals if arrival.params.num_sequences > 1]
    return [
        StopBeforeSwap(rng.choice((0, 0, 0, 1, 2)), arrival.request_id, rng.randrange(arrival.params.num_sequences))
        for arrival in wide
    ]


def _make_faults(rng: random.Random) -> list[Fault]:
    faults: list[Fault] = []
    if rng.random() < 0.2:
        first = rng.randrange(25)
        num_failures = rng.choice((1, 1, 2, 2, 3))
        faults += [StepFailure(first + number, rng.randrange(16)) for number in range(num_failures)]
    if rng.random() < 0.15:
        faults.append(SwapFailure(rng.choice((0, 0, 1, 2)), rng.randrange(6)))
    if rng.random() < 0.1:
        faults.append(BadLogits(rng.randrange(25), rng.randint(1, 3)))
    if rng.random() < 0.2:
        faults += [NoRoom(rng.randrange(80), rng.choice((1, 1, 2, 10))) for _ in range(rng.randint(1, 3))]
    return faults


assert EOS not in ALPHABET
