"""What the engine tells about its steps and requests as they happen, for whoever exports metrics.

Times are seconds of `time.monotonic`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pagedcore.engine.sequence import FinishReason, Sequence
from pagedcore.engine.sequence_group import SequenceGroup

RECORD_LIMIT = 16384  # of each kind; minutes of steps, should nobody take them


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step whose result has been taken over.

    `num_tokens`: tokens computed. `times_to_first_token`: seconds since arrival, one for each
    request that got its first token. `token_intervals`: (seconds since the same sequence's token before, how many tokens).
    """

    num_tokens: int
    times_to_first_token: list[float]
    token_intervals: list[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request that has ended; `num_generation_tokens` over all its sequences. None: it has not come to that."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_generation_tokens: int
    n: int
    best_of: int
    max_tokens: int | None
    arrived_at: float
    scheduled_at: float | None
    first_token_at: float | None
    last_token_at: float | None
    ended_at: float


@dataclass(frozen=True)
class Records:
    """Everything since the last time, oldest first; `num_lost` records did not fit the recorder.

    `cancel_seconds`: for each cancelled request, the time from the abort's arrival to its blocks being free.
    """

    steps: list[StepRecord] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)
    cancel_seconds: list[float] = field(default_factory=list)
    num_lost: int = 0


class Recorder:
    """Holds records between the engine thread, which adds them, and one other thread, which takes them. Bounded."""

    def __init__(self, limit: int = RECORD_LIMIT) -> None:
        self._limit = limit
        self._steps: deque[StepRecord] = deque()
        self._requests: deque[RequestRecord] = deque()
        self._cancels: deque[float] = deque()
        self._num_lost = 0  # written by the engine thread only
        self._num_lost_told = 0

    def add_step(self, record: StepRecord) -> None:
        if len(self._steps) < self._limit:
            self._steps.append(record)
        else:
            self._num_lost += 1

    def add_request(self, record: RequestRecord) -> None:
        if len(self._requests) < self._limit:
            self._requests.append(record)
        else:
            self._num_lost += 1

    def add_cancel(self, seconds: float) -> None:
        if len(self._cancels) < self._limit:
            self._cancels.append(seconds)
        else:
            self._num_lost += 1

    def take(self) -> Records:
        """Everything that has been added since the last call."""
        lost = self._num_lost
        lost_since, self._num_lost_told = lost - self._num_lost_told, lost
        return Records(
            [self._steps.popleft() for _ in range(len(self._steps))],
            [self._requests.popleft() for _ in range(len(self._requests))],
            [self._cancels.popleft() for _ in range(len(self._cancels))],
            lost_since,
        )


class StepTimes:
    """The times of a step's tokens.

    A sequence that drew in the step before as well, as nearly all do, has the same time between its tokens as every other
    such sequence: they need only be counted. The irregular ones are looked at one by one.
    """

    __slots__ = (
        "_intervals",
        "_now",
        "_since_step_before",
        "_times_to_first_token",
        "num_irregular",
        "num_prompt_tokens",
    )

    def __init__(self, now: float, since_step_before: float) -> None:
        """`now`: when the step's result was there; `since_step_before`: seconds since that of the step before."""
        self._now = now
        self._since_step_before = since_step_before
        self._times_to_first_token: list[float] = []
        self._intervals: list[tuple[float, int]] = []
        self.num_irregular = 0
        self.num_prompt_tokens = 0  # of the requests that got their first token

    def add_irregular(self, sequence: Sequence) -> None:
        """Note a token of a sequence that drew nothing in the step before. `token_at` is that of its token before."""
        self.num_irregular += 1
        if sequence.token_at:
            self._intervals.append((self._now - sequence.token_at, 1))
        else:
            self._note_first_token(sequence)

    def add_beam(self, beam: Sequence) -> None:
        """Note that a beam goes on. Times between a beam's tokens are nobody's: its text is sent when the search has ended."""
        beam.token_at = self._now
        self._note_first_token(beam)

    def _note_first_token(self, sequence: Sequence) -> None:
        group = sequence.group
        if group.first_token_at is None:  # the other sequences of a group begin with it
            group.first_token_at = self._now
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self._times_to_first_token.append(self._now - sequence.request.arrived_at)

    def record(self, num_tokens: int, num_drawn: int) -> StepRecord:
        """The step's record, when all its tokens are known; `num_tokens` computed, `num_drawn` drawn."""
        num_regular = num_drawn - self.num_irregular
        if num_regular > 0:
            self._intervals.append((self._since_step_before, num_regular))
        return StepRecord(num_tokens, self._times_to_first_token, self._intervals)


def request_record(group: SequenceGroup, reason: FinishReason, now: float) -> RequestRecord:
    """The record of a request that ends now, whose sequences are as they were then. Of beams, those that are output count."""
    num_generation_tokens = group.num_ended_tokens + sum(seq.num_output_tokens for seq in group.sequences)
    if group.search is not None:
        num_generation_tokens = sum(len(beam.token_ids) for beam in group.search.ended[: group.num_outputs])
    request, params = group.lead.request, group.lead.request.sampling_params
    return RequestRecord(
        finish_reason=reason,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_generation_tokens=num_generation_tokens,
        n=params.n,
        best_of=params.num_sequences,
        max_tokens=params.max_tokens,
        arrived_at=request.arrived_at,
        scheduled_at=group.scheduled_at,
        first_token_at=group.first_token_at,
        last_token_at=max((seq.token_at for seq in group.sequences), default=0.0) or None,
        ended_at=now,
    )
