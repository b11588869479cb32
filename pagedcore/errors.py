"""The errors the engine reports to its users."""

from __future__ import annotations

from typing import Any

MAX_SHOWN = 64  # characters of a value in an error text


class ConfigError(ValueError):
    """The engine's configuration or the model folder cannot be used; the text says what to change."""


class RequestError(ValueError):
    """A request that cannot be served as asked: the client's to mend. The text names field, allowed range and given value."""


class OverloadedError(RuntimeError):
    """Too many requests wait already. The text names the limit and how many there are."""


class DeadlineError(RuntimeError):
    """A request's time was up before it had ended. The text says how long it took and how far it got."""


class EngineDeadError(RuntimeError):
    """The engine has stopped after a fatal error; no request can be served."""


class NonFiniteLogitsError(RuntimeError):
    """The model gave NaN or infinite logits for this request; others are not concerned."""


def public_text(error: Exception) -> str:
    """What a client may know of an error that is not worded for clients: its text can have paths and addresses in it."""
    return f"internal error ({type(error).__name__}), see the server's log"


def shown(value: Any) -> str:
    """A value for an error text: in ASCII, escaped and cut."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
