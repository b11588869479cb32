"""Strict JSON: what a client sends is decoded as it was meant, or refused with the reason."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

import numpy as np

from pagedcore.errors import RequestError, shown

MAX_DEPTH = 32  # of lists and objects inside each other
MAX_DIGITS = 64  # of an integer
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)


def parse_json_object(name: str, text: str) -> dict[str, Any]:
    """Decode a JSON object; an empty text is an empty object. `name` is what the error calls it.

    Raises:
        RequestError: it is none, repeats a key, is nested deeper than MAX_DEPTH, holds NaN, Infinity, a number too large
            for a float, an integer of more than MAX_DIGITS digits or a lone surrogate, or text follows it.
    """
    if not text:
        return {}
    values = _parse(name, text, "a JSON object")
    if not isinstance(values, dict):
        raise RequestError(f"{name} must be a JSON object, got {type(values).__name__}")
    return values


def parse_json_list(name: str, text: str) -> list[Any]:
    """Decode a JSON list; as `parse_json_object` otherwise, but an empty text is none."""
    values = _parse(name, text, "a JSON list")
    if not isinstance(values, list):
        raise RequestError(f"{name} must be a JSON list, got {type(values).__name__}")
    return values


def _parse(name: str, text: str, wanted: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            (repeated, count), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise RequestError(f"{name} must not repeat a key, got {shown(repeated)} {count} times")
        return values

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise RequestError(f"{name} must hold integers of at most {MAX_DIGITS} digits, got one of {len(digits)}")
        return int(digits)

    def refuse(number: str) -> None:
        raise RequestError(f"{name} must hold finite numbers only, got {number[:MAX_DIGITS]}")

    def finite(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            refuse(digits)
        return value

    depth = _depth(text)
    if depth > MAX_DEPTH:
        raise RequestError(f"{name} must be nested at most {MAX_DEPTH} levels deep, got {depth}")
    try:
        values = json.loads(
            text, object_pairs_hook=unique, parse_constant=refuse, parse_int=integer, parse_float=finite
        )
        json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RequestError(f"{name} must be {wanted}: {error.msg} at character {error.pos}") from error
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} must hold valid Unicode text, got a lone surrogate") from error
    return values


def _depth(text: str) -> int:
    """How many brackets are open at once, outside strings."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0  # not worth a closer look
    characters = np.frombuffer(_STRING.sub("", text).encode(errors="replace"), np.uint8)
    opening = (characters == ord("[")) | (characters == ord("{"))
    closing = (characters == ord("]")) | (characters == ord("}"))
    return int(np.cumsum(opening.astype(np.int8) - closing, dtype=np.int64).max(initial=0))
