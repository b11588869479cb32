"""What a simulation found."""

from __future__ import annotations


class SimulationError(BaseException):
    """The engine did what it must not. No Exception: the engine, on whose stack it is raised, must not make light of it."""


def require(condition: bool, text: str) -> None:
    """Raise SimulationError unless the condition holds; unlike `assert`, in every mode of Python."""
    if not condition:
        raise SimulationError(text)
