"""Typed, checked access to the values of a model folder's JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagedcore.errors import ConfigError


class Fields:
    """Typed access to the values of one JSON file; every refusal names file, field and value."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` where it is absent or null."""
        value = self._values.get(name)
        return default if value is None else value

    def error(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{self._source}: {name} {problem}, got {self._values.get(name)!r}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "must be an integer at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
            raise self.error(name, "must be a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def token_ids(self, name: str) -> list[int]:
        """One id, a list of ids, or null."""
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
            raise self.error(name, "must be a token id or a list of them")
        return ids

    def section(self, name: str) -> Fields | None:
        """A nested object, or None where it is absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return Fields(value, f"{self._source}: {name}")


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds. Raises ConfigError for a missing or broken file and for one that holds no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: model must be the path of a Hugging Face model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, holds a {type(values).__name__}")
    return values
