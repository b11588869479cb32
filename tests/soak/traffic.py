"""What clients send, drawn from a seed: requests of many kinds, of published traces' lengths, and some that must be refused."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from benchmarks.paper.workloads import AZURE, MOONCAKE, SHAREGPT_8K
from tests.triton.bad_inputs import BAD_INPUTS

# The traces' lengths are divided by it: their shape is kept, and a small machine gets through many.
LENGTH_SCALE = 16
MAX_PROMPT_WORDS, MAX_OUTPUT_TOKENS = 1920, 1024  # before that
CANCELLED, BAD, SLOW, CANARIES = 0.05, 0.02, 0.01, 0.02  # shares of all requests
NUM_PREFIXES = 8
_WORDS = (
    "the",
    "a",
    "sea",
    "river",
    "bank",
    "moon",
    "fox",
    "dog",
    "jumps",
    "over",
    "lazy",
    "quick",
    "brown",
    "runs",
    "to",
    "from",
    "light",
    "dark",
    "day",
    "night",
    "of",
    "in",
)
_CANARY_PROMPTS = ("Once upon a time", "The sea is", "1, 2, 3, 4,", "Paris is the capital of")
# Each kind of sampling beside plain greedy decoding, and how often.
_SAMPLING: tuple[tuple[int, dict[str, Any]], ...] = (
    (50, {"temperature": 0}),
    (20, {"temperature": 0.8, "top_p": 0.9}),
    (6, {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.1}),
    (5, {"temperature": 0.9, "n": 2}),
    (2, {"temperature": 0, "beam_width": 3}),
    (5, {"temperature": 0, "logprobs": 3}),
    (4, {"temperature": 0.7, "stop": ["the", "\n\n"]}),
    (3, {"temperature": 0, "cache_salt": "tenant-a"}),
    (3, {"temperature": 0.5, "priority": -1, "tenant": "b"}),
    (2, {"temperature": 0.7, "logit_bias": {"17": -5}, "min_tokens": 2}),
)


class Ends(Enum):
    """How the client means its request to end."""

    WHOLE = auto()
    CANCELLED = auto()  # the client goes after some responses, or before the first
    REFUSED = auto()
    CANARY = auto()  # whole, and with the same text every time


class Way(Enum):
    GRPC = auto()  # a stream of its own
    HTTP_STREAM = auto()
    HTTP = auto()


@dataclass(frozen=True)
class SoakRequest:
    """`gone_after`: responses after which a client that cancels is gone. `pause`: seconds between two reads, of a slow reader."""

    ends: Ends
    way: Way
    inputs: dict[str, Any]
    gone_after: int = 0
    pause: float = 0.0
    canary: str = ""


@dataclass
class Traffic:
    """An endless sequence of requests; the same for the same seed."""

    seed: int
    length_scale: int = LENGTH_SCALE
    _random: random.Random = field(init=False)
    _lengths: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lengths = []
        for source in (AZURE, SHAREGPT_8K, MOONCAKE):
            drawn = source.sample(2000, self.seed)
            self._lengths += zip(drawn.prompts.tolist(), drawn.outputs.tolist(), strict=True)

    def next(self) -> SoakRequest:
        rng, chance = self._random, self._random.random()
        way = rng.choices((Way.GRPC, Way.HTTP_STREAM, Way.HTTP), (70, 20, 10))[0]
        if chance < BAD:
            bad = rng.choice(list(BAD_INPUTS.values()))
            return SoakRequest(Ends.REFUSED, way, {"stream": way is not Way.HTTP, **bad.inputs})
        if chance < BAD + CANARIES:
            return canary_request(rng.choice(_CANARY_PROMPTS), way)
        inputs = self._inputs(streams=way is not Way.HTTP)
        if chance < BAD + CANARIES + CANCELLED:
            return SoakRequest(Ends.CANCELLED, way, inputs, gone_after=rng.choice((0, 0, 1, 2, 5)))
        pause = 0.05 if chance < BAD + CANARIES + CANCELLED + SLOW else 0.0
        return SoakRequest(Ends.WHOLE, way, inputs, pause=pause)

    def _inputs(self, streams: bool) -> dict[str, Any]:
        rng = self._random
        prompt_tokens, output_tokens = rng.choice(self._lengths)
        num_words = max(1, min(prompt_tokens, MAX_PROMPT_WORDS) // self.length_scale)
        words = rng.choices(_WORDS, k=num_words)
        if rng.random() < 0.3:  # a beginning that others have, too
            shared = random.Random(rng.randrange(NUM_PREFIXES))
            words[: num_words // 2] = shared.choices(_WORDS, k=num_words // 2)
        weights, kinds = zip(*_SAMPLING, strict=True)
        sampling = {
            **rng.choices(kinds, weights)[0],
            "max_tokens": max(1, min(output_tokens, MAX_OUTPUT_TOKENS) // self.length_scale),
        }
        sampling["min_tokens"] = min(sampling.get("min_tokens", 0), sampling["max_tokens"])
        text = " ".join(words)
        prompt = {"text_input": text}
        if rng.random() < 0.1:
            prompt = {"messages": json.dumps([{"role": "user", "content": text}])}
        extra = {"return_logprobs": True} if "logprobs" in sampling else {}
        ranked = "beam_width" in sampling
        return {**prompt, "stream": streams and not ranked, "sampling_parameters": json.dumps(sampling), **extra}


def canary_request(prompt: str, way: Way) -> SoakRequest:
    """A greedy request whose text must always be the same."""
    parameters = '{"temperature": 0, "max_tokens": 12, "ignore_eos": true}'
    inputs = {"text_input": prompt, "stream": way is not Way.HTTP, "sampling_parameters": parameters}
    return SoakRequest(Ends.CANARY, way, inputs | {"exclude_input_in_output": True}, canary=prompt)
