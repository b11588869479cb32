"""Beam search: which continuations of a request's beams go on (the rules are those of Hugging Face transformers)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import FinishReason, Sequence
from pagedcore.engine.step_plan import Int32Array

FloatArray = npt.NDArray[np.float32]


class Continuation(NamedTuple):
    """A beam and the token that it goes on with; `logprob` is of all its output, that token included."""

    beam: int
    token_id: int
    logprob: np.float32


@dataclass(frozen=True)
class Hypothesis:
    """A beam that has ended; the larger its score, the better."""

    token_ids: list[int]
    logprob: float
    score: float
    reason: FinishReason
    stop_reason: int | None  # see `TokenOutput`


class BeamSearch:
    """Owns the scores of one request's open beams and the best ended ones.

    The beams are `sequences` of the group, in the order of their scores. After every step in which all of them drew, `choose`
    says how they go on. At first there is one beam; from its continuations on there are `width`.

    Every open beam reports its `num_candidates` most likely tokens: of the `width` best continuations of all beams that do
    not end, and of those that end and rank among the first `width`, none can be missing from these lists.
    """

    def __init__(self, params: SamplingParams, first: Sequence) -> None:
        assert params.beam_width is not None
        self.width = params.beam_width
        self.num_candidates = self.width + len(first.stop_token_ids)
        self.ended: list[Hypothesis] = []  # best first, at most `width`
        self._params = params
        self._num_prompt_tokens = first.num_prompt_tokens
        self._max_total_tokens = first.max_total_tokens
        self._stops = first.stop_token_ids
        self._logprobs = np.zeros(1, np.float32)  # of the open beams
        self._candidates: dict[int, tuple[Int32Array, FloatArray]] = {}  # by sequence id

    def take(self, beam: Sequence, token_ids: Int32Array, logprobs: FloatArray) -> None:
        """Keep what a beam's step says of its next token: [num_candidates] each, most likely first."""
        self._candidates[beam.seq_id] = token_ids, logprobs

    def forget(self) -> None:
        """Forget what steps have said; the beams are computed again."""
        self._candidates.clear()

    def is_complete(self, beams: list[Sequence]) -> bool:
        """Whether every beam has drawn."""
        return len(self._candidates) == len(beams)

    def choose(self, beams: list[Sequence]) -> list[Continuation]:
        """The continuations that are the next beams, best first; none when the search has ended."""
        chosen = self._rank(beams)
        length = len(beams[0].token_ids) + 1
        is_stop = [continuation.token_id in self._stops for continuation in chosen]
        at_end = length >= self._max_total_tokens
        for continuation, stops in zip(chosen[: self.width], is_stop, strict=False):
            if stops or at_end:
                self._end(beams[continuation.beam], continuation, FinishReason.STOP if stops else FinishReason.LENGTH)
        going_on = [continuation for continuation, stops in zip(chosen, is_stop, strict=True) if not stops]
        going_on = going_on[: self.width]
        if at_end or not going_on or self._is_over(float(going_on[0].logprob), length - self._num_prompt_tokens):
            return []
        self._logprobs = np.array([continuation.logprob for continuation in going_on], np.float32)
        return going_on

    def _rank(self, beams: list[Sequence]) -> list[Continuation]:
        """The candidates of all beams, best first: as many as can matter. Takes them out of `_candidates`."""
        reported = [self._candidates.pop(beam.seq_id) for beam in beams]
        token_ids = np.concatenate([ids for ids, _ in reported])
        logprobs = np.concatenate([values for _, values in reported])
        logprobs += np.repeat(self._logprobs, self.num_candidates)
        if self._stops and len(beams[0].token_ids) - self._num_prompt_tokens < self._params.min_tokens:
            logprobs[np.isin(token_ids, list(self._stops))] = -np.inf
        order = np.argsort(-logprobs, kind="stable")[: self.width * (1 + len(self._stops))]
        return [
            Continuation(at // self.num_candidates, token_id, logprob)
            for at, token_id, logprob in zip(order.tolist(), token_ids[order].tolist(), logprobs[order], strict=True)
            if logprob > -np.inf
        ]

    def _end(self, beam: Sequence, continuation: Continuation, reason: FinishReason) -> None:
        token_ids = [*beam.output_token_ids, continuation.token_id]
        logprob = float(continuation.logprob)
        score = logprob / len(token_ids) ** self._params.length_penalty
        by_token = reason is FinishReason.STOP and continuation.token_id in self._params.stop_token_ids
        stop_reason = continuation.token_id if by_token else None
        self.ended.append(Hypothesis(token_ids, logprob, score, reason, stop_reason))
        self.ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self.ended[self.width :]

    def _is_over(self, best_logprob: float, num_output_tokens: int) -> bool:
        """Whether no open beam, the best of which has this log probability, is expected to improve on the ended ones."""
        if len(self.ended) < self.width:
            return False
        if self._params.early_stopping is True:
            return True
        length = num_output_tokens
        if self._params.early_stopping == "never" and self._params.length_penalty > 0:
            length = self._max_total_tokens - self._num_prompt_tokens
        best_possible: float = best_logprob / length**self._params.length_penalty
        return best_possible <= self.ended[-1].score
