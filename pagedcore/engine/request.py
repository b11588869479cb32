"""What a client asked for, after parsing and tokenizing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pagedcore.engine.deadlines import Deadline
from pagedcore.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    `cache_salt` keeps the request's prefix-cache entries apart from those of every other salt; equal salts share.
    `bad_words`: the token ids of each of the sampling parameters' bad words, in every spelling that counts.
    `expected_output_len` (at least 1) is how long the output will be, where an experiment knows that beforehand; only
    the baselines among the memory policies ask for it, and no output is ended by it.
    A request that has not ended at its `deadline` ends with a DeadlineError then, in `EngineThread`.
    `arrived_at`: seconds of `time.monotonic`, from which the request's times are counted.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    cache_salt: str = ""
    bad_words: tuple[tuple[int, ...], ...] = ()
    expected_output_len: int | None = None
    deadline: Deadline | None = None
    arrived_at: float = field(default_factory=time.monotonic, compare=False)


def truncate_prompt(token_ids: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    """The last `truncate_prompt_tokens` tokens of a prompt; for -1, as many as the model takes and continues."""
    limit = params.truncate_prompt_tokens
    if limit is None:
        return token_ids
    return token_ids[-(max_model_len - 1 if limit == -1 else limit) :]
