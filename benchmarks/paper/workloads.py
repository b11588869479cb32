"""Request traces: lengths fitted to the paper's data sets or taken from published traces, with Poisson arrivals."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).resolve().parents[1] / "data"
MAX_MODEL_LEN = 2048  # OPT's context; longer requests are left out
END_TOKEN, FILLER_TOKEN, FIRST_FREE_TOKEN = 0, 1, 2  # a prompt is told from others by tokens from FIRST_FREE_TOKEN on
_FIT_SEED, _FIT_COUNT = 0, 100_000

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TraceRequest:
    """When a request arrives (seconds), its prompt, and how many samples it wants of how many tokens each.

    `beam_parents`: the samples are beams, and for each of their tokens but the first and the last: which beam each of them,
    best first, goes on from.
    """

    arrival: float
    prompt: list[int]
    output_len: int
    num_samples: int = 1
    beam_parents: list[list[int]] | None = None


@dataclass(frozen=True)
class Lengths:
    """Prompt and output lengths in tokens, one pair a request: [num_requests] each."""

    prompts: IntArray
    outputs: IntArray


class LengthSource(Protocol):
    """Where lengths come from."""

    @property
    def name(self) -> str: ...

    def sample(self, count: int, seed: int) -> Lengths:
        """`count` pairs of lengths, at least 1 each and at most MAX_MODEL_LEN together."""
        ...


@dataclass(frozen=True)
class LogNormalLengths:
    """Independent log-normal prompt and output lengths whose means, as sampled, are those of a data set.

    The paper gives means only (figure 11). `*_sigma` are the standard deviations of the logarithms; docs/paper.md says where
    they come from.
    """

    name: str
    prompt_mean: float
    output_mean: float
    prompt_sigma: float
    output_sigma: float

    def sample(self, count: int, seed: int) -> Lengths:
        prompt_scale, output_scale = _scales(self)
        rng = np.random.default_rng(seed)
        drawn = _draw(self, count + count // 4 + 100, rng, prompt_scale, output_scale)
        assert len(drawn.prompts) >= count
        return Lengths(drawn.prompts[:count], drawn.outputs[:count])

    def mean_context(self) -> float:
        """Tokens that a request holds, averaged over the steps it is in: E[prompt output + output^2 / 2] / E[output]."""
        drawn = self.sample(_FIT_COUNT, _FIT_SEED)
        held = drawn.prompts * drawn.outputs + drawn.outputs**2 / 2
        return float(held.mean() / drawn.outputs.mean())


@cache
def _scales(lengths: LogNormalLengths) -> tuple[float, float]:
    """The scales of prompts and outputs at which the means are right, after rounding and leaving out the longest."""
    prompt_scale, output_scale = lengths.prompt_mean, lengths.output_mean
    for _ in range(30):
        drawn = _draw(lengths, _FIT_COUNT, np.random.default_rng(_FIT_SEED), prompt_scale, output_scale)
        prompt_scale *= lengths.prompt_mean / float(drawn.prompts.mean())
        output_scale *= lengths.output_mean / float(drawn.outputs.mean())
    return prompt_scale, output_scale


def _draw(
    lengths: LogNormalLengths, count: int, rng: np.random.Generator, prompt_scale: float, output_scale: float
) -> Lengths:
    columns = []
    for scale, sigma in ((prompt_scale, lengths.prompt_sigma), (output_scale, lengths.output_sigma)):
        values = scale * np.exp(sigma * rng.standard_normal(count))
        columns.append(np.maximum(np.rint(values), 1).astype(np.int64))
    fits = columns[0] + columns[1] <= MAX_MODEL_LEN
    return Lengths(columns[0][fits], columns[1][fits])


@dataclass(frozen=True)
class PublishedLengths:
    """Pairs from a file of benchmarks/data (its README has the source), drawn at random from those that fit."""

    name: str
    file: str

    def all(self) -> Lengths:
        with gzip.open(DATA / self.file, "rt", encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        pairs = np.array([(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in rows], dtype=np.int64)
        pairs = pairs[(pairs.min(axis=1) > 0) & (pairs.sum(axis=1) <= MAX_MODEL_LEN)]
        return Lengths(pairs[:, 0], pairs[:, 1])

    def sample(self, count: int, seed: int) -> Lengths:
        lengths = self.all()
        chosen = np.random.default_rng(seed).integers(0, len(lengths.prompts), count)
        return Lengths(lengths.prompts[chosen], lengths.outputs[chosen])


SHAREGPT = LogNormalLengths("ShareGPT", 161.31, 337.99, prompt_sigma=1.1, output_sigma=0.84)
ALPACA = LogNormalLengths("Alpaca", 19.31, 58.45, prompt_sigma=0.5, output_sigma=0.84)
# English-German sentence pairs: the paper does not give their lengths; these are a choice.
TRANSLATION = LogNormalLengths("translation", 35.0, 40.0, prompt_sigma=0.5, output_sigma=0.5)
AZURE = PublishedLengths("Azure conversations", "azure_conversations.csv.gz")
SHAREGPT_8K = PublishedLengths("ShareGPT 8k (multi-turn)", "sharegpt_8k.csv.gz")
MOONCAKE = PublishedLengths("Mooncake conversations", "mooncake_conversations.csv.gz")


class Trace(Protocol):
    """A recipe for requests: small enough to send to a worker process, which builds them."""

    def build(self, rate: float, seconds: float) -> list[TraceRequest]:
        """The requests of so many seconds, in order of arrival, arriving at `rate` a second independently of each other."""
        ...


def _arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    count = max(int(rate * seconds), 1)
    arrivals: list[float] = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()
    return arrivals


@dataclass(frozen=True)
class PlainTrace:
    """Requests that have nothing in common, with `num_samples` outputs of equal length each (parallel sampling)."""

    lengths: LengthSource
    num_samples: int = 1
    seed: int = 1

    def build(self, rate: float, seconds: float) -> list[TraceRequest]:
        arrivals = _arrivals(rate, seconds, self.seed)
        drawn = self.lengths.sample(len(arrivals), self.seed + 1)
        pairs = zip(arrivals, drawn.prompts.tolist(), drawn.outputs.tolist(), strict=True)
        return [
            TraceRequest(arrival, [FIRST_FREE_TOKEN + number] + [FILLER_TOKEN] * (prompt - 1), output, self.num_samples)
            for number, (arrival, prompt, output) in enumerate(pairs)
        ]


@cache
def recorded_parents(width: int) -> list[list[list[int]]]:
    """Recorded beam searches: for each prompt and step, the parent of each of `width` beams."""
    with gzip.open(DATA / "beam_parents.json.gz", "rt", encoding="utf-8") as stream:
        flat: list[list[int]] = json.load(stream)[str(width)]
    return [[steps[at : at + width] for at in range(0, len(steps), width)] for steps in flat]


@dataclass(frozen=True)
class BeamTrace:
    """Requests of `width` beams, which descend from each other as in the recorded searches, in turn.

    An output ends with the record at the latest.
    """

    lengths: LengthSource
    width: int
    seed: int = 1

    def build(self, rate: float, seconds: float) -> list[TraceRequest]:
        records = recorded_parents(self.width)
        requests = []
        for number, request in enumerate(PlainTrace(self.lengths, self.width, self.seed).build(rate, seconds)):
            parents = records[number % len(records)]
            requests.append(replace(request, output_len=min(request.output_len, len(parents)), beam_parents=parents))
        return requests


@dataclass(frozen=True)
class SharedPrefixTrace:
    """Every prompt is the same prefix of `prefix_len` tokens and a task of its own (section 6.4)."""

    task: LengthSource
    prefix_len: int
    seed: int = 1

    def build(self, rate: float, seconds: float) -> list[TraceRequest]:
        prefix = [FILLER_TOKEN] * self.prefix_len
        return [
            TraceRequest(request.arrival, prefix + request.prompt, request.output_len)
            for request in PlainTrace(self.task, seed=self.seed).build(rate, seconds)
        ]


@dataclass(frozen=True)
class ChatTrace:
    """Rounds of conversations: history and query, cut to the last `max_prompt` tokens, are the prompt (section 6.5).

    A round is the next one of a conversation that has been quiet for `think_seconds`, or, with the chance
    1 / `mean_rounds`, a conversation's first. Query and reply have the lengths of `turns`; a reply is at most `max_output`.
    """

    turns: LengthSource
    max_prompt: int = 1024
    max_output: int = 1024
    mean_rounds: float = 30.0
    think_seconds: float = 20.0
    seed: int = 1

    def build(self, rate: float, seconds: float) -> list[TraceRequest]:
        arrivals = _arrivals(rate, seconds, self.seed)
        drawn = self.turns.sample(len(arrivals), self.seed + 1)
        rng = np.random.default_rng(self.seed + 2)
        quiet: list[tuple[float, int, int]] = []  # time of the last round, conversation, length of its history
        requests = []
        for number, arrival in enumerate(arrivals):
            ready = [entry for entry in quiet if entry[0] + self.think_seconds <= arrival]
            conversation, history = number, 0
            if ready and rng.random() >= 1 / self.mean_rounds:
                entry = ready[int(rng.integers(len(ready)))]
                quiet.remove(entry)
                _, conversation, history = entry
            total = history + int(drawn.prompts[number])
            output = min(int(drawn.outputs[number]), self.max_output)
            length = min(total, self.max_prompt)
            # Replies are FILLER_TOKENs, as the simulated model draws them; the first token names conversation and cut.
            name = FIRST_FREE_TOKEN + conversation * 65_536 + (total - length)
            requests.append(TraceRequest(arrival, [name] + [FILLER_TOKEN] * (length - 1), output))
            quiet.append((arrival, conversation, total + output))
        return requests
