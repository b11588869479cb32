"""Strict JSON: what a client sends is decoded as it was meant, or refused with the reason."""

from __future__ import annotations

import json
from typing import Any

from pagedcore.errors import RequestError


def parse_json_object(name: str, text: str) -> dict[str, Any]:
    """Decode a JSON object; an empty text is an empty object. `name` is what the error calls it.

    Raises:
        RequestError: it is none, repeats a key, or holds NaN, Infinity or a lone surrogate, or text follows it.
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
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise RequestError(f"{name} must not repeat a key, got {ascii(repeated)[:64]} twice")
        return values

    def refuse(constant: str) -> None:
        raise RequestError(f"{name} must hold finite numbers only, got {constant}")

    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RequestError(f"{name} must be {wanted}: {error.msg} at character {error.pos}") from error
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} must hold valid Unicode text, got a lone surrogate") from error
    except RecursionError as error:
        raise RequestError(f"{name} must be {wanted}, got one nested too deeply") from error
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"{name} must be {wanted}: {error}") from error
    return values
