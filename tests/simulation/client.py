"""A client: holds what it is told of one request against what it must be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pagedcore.engine.clock import Clock
from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.request import Request
from pagedcore.engine.sequence import FinishReason
from pagedcore.errors import DeadlineError, EngineDeadError, NonFiniteLogitsError
from tests.simulation.failure import require
from tests.simulation.reference import Answer, answers, best_answers, prompt_logprobs
from tests.simulation.simulated_executor import PlannedFailureError


@dataclass(frozen=True)
class WhatIsDue:
    """The end of a client's request, or of some of its sequences."""

    client: Client
    end: bool
    ended: set[int]


class Client:
    """The sink of one accepted request. Every output is looked at when it comes.

    `engine_has_ended`, and what `cancel` and `stop` note, excuse an end that is not the reference's.
    `may_fail`: whether a step or logits may be bad. `shares_prefixes` tells whether anybody else can have left a prefix that the
    request may use.
    """

    def __init__(
        self,
        request: Request,
        max_model_len: int,
        clock: Clock,
        *,
        may_fail: bool,
        shares_prefixes: Callable[[Request], bool],
    ) -> None:
        self.request = request
        self.is_admitted = False
        self.engine_has_ended = False
        self.is_finished = False
        self.finish_reason: FinishReason | None = None
        self._max_model_len = max_model_len
        self._clock = clock
        self._may_fail = may_fail
        self._shares_prefixes = shares_prefixes
        self._has_cancelled = False
        self._stopped: set[int] = set()  # indices of sequences that were to end at a stop string
        self._due: set[int] = set()  # those of them that were known to go on then
        self._answers: list[Answer] | None = None
        self._told: dict[int, list[int]] = {}
        self._ended: set[int] = set()

    def cancel(self) -> None:
        """The client goes away."""
        self._has_cancelled = True

    def stop(self, index: int) -> None:
        """A stop string was found in a sequence, which may not have begun, or have ended."""
        self._stopped.add(index)
        if index in self._told:
            self._due.add(index)

    def what_is_due(self) -> WhatIsDue:
        """What the engine has to have done by the end of its next turn, at the beginning of which it hears of it."""
        return WhatIsDue(self, self._has_cancelled, self._due - self._ended)

    def check_due(self, due: WhatIsDue) -> None:
        name = self.request.request_id
        require(self.is_finished or not due.end, f"{name} goes on though it was cancelled")
        require(
            self.is_finished or due.ended <= self._ended, f"{name}: sequences {due.ended} go on behind a stop string"
        )

    def push(self, output: TokenOutput) -> None:
        name = self.request.request_id
        require(output.request_id == name, f"{name} is told of {output.request_id}")
        require(not self.is_finished, f"{name} is told something after its last output")
        self.is_finished = output.request_finished
        reason = output.finish_reason
        require((output.error is not None) == (reason is FinishReason.ERROR), f"{name}: an error without the reason")
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            require(output.request_finished and not output.token_ids, f"{name}: it ended early and goes on")
            self.finish_reason = reason
            self._check_early_end(output)
            return
        require(output.index not in self._ended, f"{name}: sequence {output.index} is told something after its end")
        if output.num_cached_tokens > 0:
            require(self._shares_prefixes(self.request), f"{name} used what others keep to themselves")
        self._check_prompt(output, is_first=self._answers is None)
        if self._answers is None:
            self._answers = answers(self.request, self._max_model_len)
        if self.request.sampling_params.ranks_outputs:
            self._check_ranked(output, self._answers)
        else:
            self._check_streamed(output, self._answers[output.index])
        if reason is not None:
            self._ended.add(output.index)
        if output.request_finished:
            self.finish_reason = reason
            require(len(self._ended) == self.request.sampling_params.n, f"{name} was not told how all sequences end")

    def _check_prompt(self, output: TokenOutput, *, is_first: bool) -> None:
        """The first output, and no other, says how likely the prompt was, if the request wants to know."""
        name, wanted = self.request.request_id, self.request.sampling_params.prompt_logprobs
        told = output.prompt_logprobs
        may_lack = bool(self._stopped) and not output.token_ids  # it was ended before its prompt had been computed
        is_due = is_first and wanted is not None
        require((told is not None) == is_due or (told is None and may_lack), f"{name}: log probabilities of the prompt")
        if told is not None:
            assert wanted is not None
            expected = prompt_logprobs(self.request.prompt_token_ids, wanted)
            require(told.positions() == expected, f"{name}: wrong log probabilities of the prompt")

    def _check_early_end(self, output: TokenOutput) -> None:
        """An abort or an error needs a cause."""
        error, name = output.error, self.request.request_id
        if output.finish_reason is FinishReason.ABORT:
            require(self._has_cancelled, f"{name} was aborted, and nobody asked for it")
        elif isinstance(error, DeadlineError):
            deadline = self.request.deadline
            require(deadline is not None and deadline.at <= self._clock(), f"{name}: its deadline has not passed")
        elif isinstance(error, EngineDeadError):
            require(self.engine_has_ended, f"{name} hears that the engine has ended")
        else:
            planned = isinstance(error, PlannedFailureError | NonFiniteLogitsError)
            require(planned and self._may_fail, f"{name} failed with {error!r}")

    def _check_streamed(self, output: TokenOutput, answer: Answer) -> None:
        name, index, params = self.request.request_id, output.index, self.request.sampling_params
        told = self._told.setdefault(index, [])
        told += output.token_ids
        wanted = answer.token_ids
        require(told == wanted[: len(told)], f"{name}, sequence {index}: was told {told} and must be told {wanted}")
        require((output.logprobs is not None) == (params.logprobs is not None), f"{name}: log probabilities")
        if output.finish_reason is None:
            require(len(told) < len(wanted), f"{name}, sequence {index} goes on behind its last token")
        elif len(told) == len(wanted):
            require(output.finish_reason is answer.reason or index in self._stopped, f"{name}: {output.finish_reason}")
        else:
            is_stopped = index in self._stopped and output.finish_reason is FinishReason.STOP
            require(is_stopped, f"{name}, sequence {index} ends after {told} and must be told {wanted}")

    def _check_ranked(self, output: TokenOutput, drawn: list[Answer]) -> None:
        """Ranked outputs come at the end, best first. One that a stop string cut short is the beginning of one that is drawn."""
        name, index = self.request.request_id, output.index
        require(output.finish_reason is not None, f"{name}: an output before the ranking")
        if self._stopped:
            length = len(output.token_ids)
            begins = any(answer.token_ids[:length] == output.token_ids for answer in drawn)
            require(begins, f"{name}, output {index}: {output.token_ids} is no beginning of any output")
            return
        answer = best_answers(self.request, drawn)[index]
        require(
            output.token_ids == answer.token_ids and output.finish_reason is answer.reason,
            f"{name}, output {index}: was told {output.token_ids} and must be told {answer.token_ids}",
        )
        require(output.cumulative_logprob == answer.logprob, f"{name}, output {index}: its log probability is wrong")
