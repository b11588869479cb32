"""The synchronous engine: requests in, one step at a time, token outputs out."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pagedcore.engine.executor import Executor, PendingStep
from pagedcore.engine.logprobs import MAX_PROMPT_LOGPROBS, most_prompt_logprobs
from pagedcore.engine.outputs import EngineStats, TokenOutput
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.seeds import mix_seed
from pagedcore.engine.sequence import FinishReason, Sequence
from pagedcore.engine.sequence_group import GroupStatus, SequenceGroup
from pagedcore.engine.step_plan import StepPlan
from pagedcore.engine.token_rules import check_token_rules, reachable_words
from pagedcore.errors import EngineDeadError, RequestError, public_text

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; after that the device or the model is taken to be broken


@dataclass(frozen=True)
class EngineLimits:
    """What bounds a single request."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True)
class RequestProgress:
    """`state`: queued, running, preempted, ...; `num_output_tokens`: of all its sequences, together."""

    state: str
    num_output_tokens: int


class Engine:
    """Runs plan, launch and commit; with `one_step_ahead`, plans and launches step n + 1 before step n is committed.

    Not thread-safe: `EngineThread` is its only user in a server.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        limits: EngineLimits,
        *,
        seed: int = 0,
        one_step_ahead: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.limits = limits
        self._executor = executor
        self._one_step_ahead = one_step_ahead
        self._seed = seed
        self._num_requests = 0
        self._groups: dict[str, SequenceGroup] = {}
        self._launched: tuple[StepPlan, PendingStep] | None = None
        self._num_failed_steps = 0
        self._in_doubt = False  # the step committed last failed, or one of its requests did

    def check(self, request: Request) -> int:
        """Return the most tokens, prompt included, the request may reach; raise RequestError if it cannot be served."""
        num_prompt_tokens = len(request.prompt_token_ids)
        limits, params = self.limits, request.sampling_params
        if num_prompt_tokens == 0:
            raise RequestError("the prompt is empty; it must have at least 1 token")
        if num_prompt_tokens >= limits.max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens; it must have at most {limits.max_model_len - 1}, so that prompt "
                f"and output fit max_model_len = {limits.max_model_len}"
            )
        low, high = min(request.prompt_token_ids), max(request.prompt_token_ids)
        if low < 0 or high >= limits.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(f"prompt_token_ids must be in [0, {limits.vocab_size - 1}], got {wrong}")
        bad_words = reachable_words(request.bad_words, limits.vocab_size)
        check_token_rules(params, bad_words, self._stop_token_ids(params), limits.vocab_size)
        self._check_logprobs(params, num_prompt_tokens)
        num_stops = len({*params.stop_token_ids, *(() if params.ignore_eos else limits.eos_token_ids)})
        if params.beam_width is not None and params.beam_width + num_stops > limits.vocab_size:
            raise RequestError(
                f"beam_width must be at most {limits.vocab_size - num_stops} (vocabulary without stop tokens), "
                f"got {params.beam_width}"
            )
        max_total_tokens = limits.max_model_len
        if params.max_tokens is not None:
            max_total_tokens = min(max_total_tokens, num_prompt_tokens + params.max_tokens)
        self.scheduler.check_fits(request, max_total_tokens)
        return max_total_tokens

    def _check_logprobs(self, params: SamplingParams, num_prompt_tokens: int) -> None:
        high = self.limits.max_logprobs
        for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if value is not None and value > high:
                raise RequestError(f"{name} must be in [0, {high}] (max_logprobs), got {value}")
        most = most_prompt_logprobs(num_prompt_tokens)
        if params.prompt_logprobs is not None and params.prompt_logprobs > most:
            allowed = f"in [0, {most}]" if most >= 0 else "left out"
            raise RequestError(
                f"prompt_logprobs must be {allowed} with a prompt of {num_prompt_tokens} tokens (at most "
                f"{MAX_PROMPT_LOGPROBS} log probabilities together), got {params.prompt_logprobs}"
            )

    def add_request(self, request: Request) -> None:
        """Queue a request; raises RequestError if it can never be served or its id is in use."""
        if request.request_id in self._groups:
            raise RequestError(f"request_id {request.request_id!r} is in use by an unfinished request")
        max_total_tokens = self.check(request)
        params = request.sampling_params
        if request.bad_words:
            request = replace(request, bad_words=reachable_words(request.bad_words, self.limits.vocab_size))
        stop_token_ids = self._stop_token_ids(params)
        seed = params.seed if params.seed is not None else mix_seed(self._seed, self._num_requests)
        self._num_requests += 1
        group = SequenceGroup(Sequence(self.scheduler.new_seq_id(), request, max_total_tokens, stop_token_ids, seed))
        self._groups[request.request_id] = group
        self.scheduler.add(group)

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        ids = frozenset(params.stop_token_ids)
        return ids if params.ignore_eos else ids | self.limits.eos_token_ids

    def abort(self, request_id: str) -> TokenOutput | None:
        """End a request and free its blocks; returns its last output, or None if it has already ended."""
        group = self._groups.pop(request_id, None)
        if group is None:
            return None
        self.scheduler.abort(group)
        return TokenOutput(request_id, 0, [], FinishReason.ABORT, request_finished=True)

    def end_sequence(self, request_id: str, index: int) -> list[TokenOutput]:
        """End one sequence of a request, as a stop token would; the others go on. Nothing if it has ended or not begun."""
        group = self._groups.get(request_id)
        sequences = [] if group is None or not group.has_branched or group.search is not None else group.sequences
        outputs: list[TokenOutput] = []
        for sequence in [sequence for sequence in sequences if sequence.index == index]:
            outputs = self.scheduler.end_sequence(sequence)
        self._forget(outputs)
        return outputs

    def pin_prefix(self, token_ids: list[int]) -> None:
        """Compute a prefix and keep it in the pool for good. For a start-up: the engine has no requests yet.

        Raises RequestError if it does not fit, and what the model raised if it could not be computed.
        """
        assert not self.has_work()
        request = Request("pinned prefix", token_ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        self.add_request(request)
        (sequence,) = self._groups[request.request_id].sequences
        while (plan := self.scheduler.schedule()) is not None:
            if sequence.num_computed_tokens == len(token_ids):
                self.scheduler.pin(sequence)
            for output in self._commit((plan, self._executor.launch(plan))):
                if output.error is not None:
                    raise output.error

    def progress(self, request_id: str) -> RequestProgress:
        """How far a request is. Any thread may ask; what it learns may be a step old."""
        group = self._groups.get(request_id)
        if group is None:
            return RequestProgress("queued", 0)
        num_output_tokens = group.num_ended_tokens + sum(seq.num_output_tokens for seq in tuple(group.sequences))
        state = "queued" if group.status is GroupStatus.WAITING else group.status.value
        return RequestProgress(state, num_output_tokens)

    def has_work(self) -> bool:
        return self._launched is not None or self.scheduler.has_unfinished()

    def step(self) -> list[TokenOutput]:
        """Plan and launch a step, and return the outputs of the step before it (of this one, if not one step ahead).

        A failed step ends its own requests with an error. After a failure nothing runs ahead until a step has succeeded: a
        plan that counts on a step that then fails too is for nothing. Raises EngineDeadError after
        MAX_FAILED_STEPS in a row.
        """
        plan = self.scheduler.schedule()
        before, self._launched = self._launched, None
        if plan is not None:
            self._launched = (plan, self._executor.launch(plan))
        outputs = self._commit(before) if before is not None else []
        if (self._in_doubt or not self._one_step_ahead) and self._launched is not None:
            launched, self._launched = self._launched, None
            outputs += self._commit(launched)
        return outputs

    def _commit(self, launched: tuple[StepPlan, PendingStep]) -> list[TokenOutput]:
        plan, pending = launched
        try:
            result = pending.wait()
        except EngineDeadError:
            raise
        except Exception as error:  # whatever it is, it is scoped to this step's requests
            return self._step_failed(plan, error)
        self._num_failed_steps, self._in_doubt = 0, False
        outputs = self.scheduler.commit(plan, result)
        self._forget(outputs)
        return outputs

    def _step_failed(self, plan: StepPlan, error: Exception) -> list[TokenOutput]:
        logger.error("step %d with %d sequences failed", plan.step_id, len(plan.sequences), exc_info=error)
        self._in_doubt = True
        if any(sequence.group.finish_reason is FinishReason.ERROR for sequence in plan.sequences):
            # Launched before the failure of the step before was known, with the request that may have caused it.
            self.scheduler.retry_step(plan)
            return []
        self._num_failed_steps += 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise EngineDeadError(f"{MAX_FAILED_STEPS} steps in a row failed; {public_text(error)}") from error
        outputs = self.scheduler.fail_step(plan, error)
        self._forget(outputs)
        return outputs

    def _forget(self, outputs: Iterable[TokenOutput]) -> None:
        for output in outputs:
            if output.request_finished:
                self._in_doubt |= output.finish_reason is FinishReason.ERROR
                del self._groups[output.request_id]

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def shutdown(self) -> None:
        self._executor.shutdown()
