"""Log probabilities as the engine hands them back: of drawn tokens, step by step, and of a prompt, when it is computed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pagedcore.engine.step_plan import LogprobArrays, StepResult

MAX_PROMPT_LOGPROBS = 1 << 19  # of a prompt, all positions together: about 45 MB of JSON, which take a second to write


class TokenLogprobs(NamedTuple):
    """Log probabilities at one position of prompt or output, of the model's unmodified distribution."""

    logprob: float
    rank: int  # of the token that is there; 1: most likely
    top_token_ids: list[int]  # the most likely ones, descending; -1 behind the last one of finite probability
    top_logprobs: list[float]


class StepLogprobs:
    """The log probabilities of a step as Python numbers, converted all at once: row by row it takes several times as long."""

    def __init__(self, result: StepResult) -> None:
        assert result.chosen_logprobs is not None and result.chosen_ranks is not None
        assert result.top_logprobs is not None and result.top_token_ids is not None
        self._chosen: list[float] = result.chosen_logprobs.tolist()
        self._ranks: list[int] = result.chosen_ranks.tolist()
        self._top_ids: list[list[int]] = result.top_token_ids.tolist()
        self._top: list[list[float]] = result.top_logprobs.tolist()

    def of_row(self, row: int, wanted: int) -> TokenLogprobs:
        """Those of the token drawn in a row, and of the `wanted` most likely ones."""
        ids, logprobs = self._top_ids[row], self._top[row]
        if len(ids) > wanted:
            ids, logprobs = ids[:wanted], logprobs[:wanted]
        return TokenLogprobs(self._chosen[row], self._ranks[row], ids, logprobs)


class PromptLogprobs:
    """Log probabilities of a prompt's tokens, each given those before it; the first one has none.

    They become known from the front, as the prompt is computed: `num_known` is how many tokens that is, the first one
    included. What is known stays so when the prompt has to be computed again.
    """

    def __init__(self, num_prompt_tokens: int, num_top: int) -> None:
        """`num_top`: how many of the most likely tokens are kept for each position; see `most_prompt_logprobs`."""
        count = num_prompt_tokens - 1
        self.num_tokens = num_prompt_tokens
        self.num_known = 1
        self._num_top = num_top
        self._chosen = np.empty(count, np.float32)
        self._ranks = np.empty(count, np.int32)
        self._top = np.empty((count, num_top), np.float32)
        self._top_ids = np.empty((count, num_top), np.int32)

    @property
    def is_complete(self) -> bool:
        return self.num_known == self.num_tokens

    def missing_from(self, start: int, end: int) -> tuple[int, int]:
        """The prompt tokens (from, up to) still unknown that computing tokens [start, end) tells of: each tells of the next."""
        return max(start + 1, self.num_known), min(end + 1, self.num_tokens)

    def take(self, begin: int, end: int, arrays: LogprobArrays, at: int) -> bool:
        """Take over those of prompt tokens [begin, end), which are in `arrays` from `at` on.

        Returns whether all of them are finite; if not, nothing is taken.
        """
        source, target = slice(at, at + end - begin), slice(begin - 1, end - 1)
        if not np.isfinite(arrays.chosen_logprobs[source]).all():
            return False
        self._chosen[target] = arrays.chosen_logprobs[source]
        self._ranks[target] = arrays.chosen_ranks[source]
        self._top[target] = arrays.top_logprobs[source, : self._num_top]
        self._top_ids[target] = arrays.top_token_ids[source, : self._num_top]
        assert begin <= self.num_known, "a prompt is computed from the front"
        self.num_known = max(self.num_known, end)
        return True

    def positions(self) -> list[TokenLogprobs]:
        """[num_tokens - 1], of the second token and those behind it. Only when complete."""
        assert self.is_complete
        columns = zip(self._chosen, self._ranks, self._top_ids, self._top, strict=True)
        return [
            TokenLogprobs(float(chosen), int(rank), ids.tolist(), top.tolist()) for chosen, rank, ids, top in columns
        ]


def most_prompt_logprobs(num_prompt_tokens: int) -> int:
    """The most `prompt_logprobs` that a request may ask for with a prompt of so many tokens; -1: none, not even 0."""
    return MAX_PROMPT_LOGPROBS // num_prompt_tokens - 1
