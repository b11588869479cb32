"""Checks of what single sampling parameters are given; a bad value raises RequestError with the field and what it allows."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from pagedcore.errors import RequestError, shown

MAX_TOKEN_ID = 2**31 - 1
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIASES = 1024


def is_integer(value: Any, low: int, high: int) -> bool:
    """Whether `value` is an integer in [low, high]; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high


def as_items(name: str, value: Any, wanted: str) -> tuple[Any, ...]:
    """The items of a list, in their order; none of None. `wanted` says what the field takes."""
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be {wanted}, got {shown(value)}")
    return tuple(value)


def check_token_ids(name: str, value: Any, limit: int) -> tuple[int, ...]:
    """At most `limit` token ids, in the order given."""
    ids = as_items(name, value, "a list of token ids")
    if len(ids) > limit:
        raise RequestError(f"{name} must hold at most {limit} ids, got {len(ids)}")
    for token_id in ids:
        if not is_integer(token_id, 0, MAX_TOKEN_ID):
            raise RequestError(f"{name} must hold token ids (integers from 0 up), got {shown(token_id)}")
    return tuple(int(token_id) for token_id in ids)


def check_logit_bias(value: Any) -> tuple[tuple[int, float], ...] | None:
    """The biases by ascending token id, the keys of a JSON object being texts; None for none."""
    pairs = value.items() if isinstance(value, Mapping) else value if isinstance(value, tuple) else None
    if pairs is None and value is not None:
        raise RequestError(f"logit_bias must be an object of biases by token id, got {shown(value)}")
    if pairs is not None and len(pairs) > MAX_LOGIT_BIASES:
        raise RequestError(f"logit_bias must hold at most {MAX_LOGIT_BIASES} token ids, got {len(pairs)}")
    biases: dict[int, float] = {}
    for key, bias in pairs or ():
        token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 else key
        if not is_integer(token_id, 0, MAX_TOKEN_ID):
            raise RequestError(f"logit_bias must have token ids (integers from 0 up) as keys, got {shown(key)}")
        is_number = isinstance(bias, numbers.Real) and not isinstance(bias, bool)
        if not is_number or not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            allowed = f"[{-MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]"
            raise RequestError(f"logit_bias must have numbers in {allowed} as values, got {shown(bias)}")
        if int(token_id) in biases:
            raise RequestError(f"logit_bias must name every token id once, got {token_id} twice")
        biases[int(token_id)] = float(bias)
    return tuple(sorted(biases.items())) or None
