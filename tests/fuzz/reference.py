"""What a single sampling parameter may be, said a second time and in another way than the parser says it."""

from __future__ import annotations

import math
from typing import Any

_INTEGERS = {
    "n": (1, 64),
    "best_of": (1, 64),
    "top_k": (-1, 2**31 - 1),
    "seed": (-1, 2**64 - 1),
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 16),  # the default of max_tokens
    "logprobs": (0, 2**31 - 1),
    "prompt_logprobs": (0, 2**31 - 1),
    "truncate_prompt_tokens": (-1, 2**31 - 1),
    "priority": (-(2**31), 2**31 - 1),
}
_NULLABLE = {"best_of", "seed", "max_tokens", "logprobs", "truncate_prompt_tokens", "beam_width", "stop", "bad_words"}
_NULLABLE |= {"logit_bias", "allowed_token_ids", "stop_token_ids", "prompt_logprobs"}
_FLOATS = {
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
    "temperature": (0, 100),
    "top_p": (5e-324, 1),
    "min_p": (0, 1),
    "length_penalty": (1, 1),  # any other value needs beam search
}
_FLAGS = {"ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"}
_FLAGS |= {"include_stop_str_in_output"}
BEAMS = {"beam_width", "use_beam_search", "early_stopping"}  # need each other, or other values of other parameters
_LISTS = {"stop": 64, "bad_words": 128, "stop_token_ids": 128, "allowed_token_ids": 1024}


def allows(name: str, value: Any) -> bool | None:
    """Whether the parameter may have this value, as JSON decodes it, while all others have their defaults; None: not said here,
    where a text stands for a number or a truth value."""
    if value is None:
        return name in _NULLABLE
    if isinstance(value, str) and name not in ("stop", "tenant"):
        return None if name in _INTEGERS or name in _FLOATS or name in _FLAGS or name in BEAMS else False
    if name in _INTEGERS:
        low, high = _INTEGERS[name]
        return _is_whole(value) and low <= value <= high and not (name == "truncate_prompt_tokens" and value == 0)
    if name in _FLOATS:
        low_float, high_float = _FLOATS[name]
        return type(value) in (int, float) and math.isfinite(value) and low_float <= value <= high_float
    if name in _FLAGS:
        return value is True or value is False
    if name in BEAMS:
        return name != "beam_width" and value is False
    if name == "tenant":
        return type(value) is str and len(value) <= 128
    if name == "logit_bias":
        return type(value) is dict and len(value) <= 1024 and _are_biases(value)
    items = [value] if type(value) is str else value
    if type(items) is not list or len(items) > _LISTS[name] or (name == "allowed_token_ids" and not items):
        return False
    return all(_is_item(name, item) for item in items)


def _is_whole(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value) and value == math.floor(value))


def _is_item(name: str, item: Any) -> bool:
    if name in ("stop", "bad_words"):
        return type(item) is str and len(item) in range(1, 1025) and (name == "stop" or not item.isspace())
    return type(item) is int and item in range(2**31)


def _are_biases(biases: dict[str, Any]) -> bool:
    ids = [int(key) for key in biases if key in _digits(key) and int(key) < 2**31]
    amounts = [bias for bias in biases.values() if type(bias) in (int, float) and abs(bias) <= 100]
    return len(set(ids)) == len(biases) == len(amounts)


def _digits(key: str) -> set[str]:
    return {key} if key and set(key) <= set("0123456789") and len(key) <= 10 else set()
