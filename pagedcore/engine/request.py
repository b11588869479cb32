"""What a client asked for, after parsing and tokenizing."""

from __future__ import annotations

from dataclasses import dataclass

from pagedcore.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    `cache_salt` keeps the request's prefix-cache entries apart from those of every other salt; equal salts share.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    cache_salt: str = ""
