"""A sink that tests look into."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.sequence import FinishReason
from pagedcore.errors import EngineDeadError


@dataclass
class Collector:
    """A sink that keeps everything and knows when the end has come."""

    outputs: list[TokenOutput] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def push(self, output: TokenOutput) -> None:
        assert not self.ended.is_set(), "an output after the final one"
        self.outputs.append(output)
        if output.finish_reason is not None:
            self.ended.set()

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason


def deaths_told(sinks: list[Collector]) -> set[str]:
    """What clients were told of the engine's end."""
    errors = [output.error for sink in sinks for output in sink.outputs[-1:]]
    return {str(error) for error in errors if isinstance(error, EngineDeadError)}
