"""A measured engine as a process: cases come in on standard input, times go out on standard output, a JSON line each.

Standard library only: it also runs in the peers' own environments.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, dataclass
from typing import Protocol


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `context` tokens each, then `tokens` greedy tokens for each, in lock step."""

    batch: int
    context: int
    tokens: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids [batch][context], all prompts different, the same for every engine."""
        rng = random.Random(self.batch * 100_003 + self.context)
        return [[rng.randrange(100, vocab_size) for _ in range(self.context)] for _ in range(self.batch)]


@dataclass(frozen=True)
class Times:
    """Seconds until every prompt has its first token, and for all the tokens after it."""

    prefill: float
    decode: float


class Measured(Protocol):
    """An engine that is loaded and can run a case."""

    def run(self, case: Case) -> Times: ...


def serve(engine: Measured) -> None:
    """Answer cases until standard input ends. A first line says that the engine is loaded."""
    out = sys.stdout
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(engine.run(Case(**json.loads(line))))), file=out, flush=True)
