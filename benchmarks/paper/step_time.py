"""How long a step takes: fixed + per_token * tokens computed + per_context_token * tokens attended to (seconds)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from benchmarks.paper.workloads import ALPACA, SHAREGPT, LogNormalLengths


@dataclass(frozen=True)
class ModelCost:
    """Parameters, layers and hidden size of a multi-head model in fp16; the K/V slots the paper's server has (table 1)."""

    name: str
    num_parameters: float
    num_layers: int
    hidden_size: int
    num_slots: int

    @property
    def weight_bytes(self) -> float:
        return 2 * self.num_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Key and value, each a vector of hidden_size in every layer, in fp16 (section 3)."""
        return 2 * self.hidden_size * self.num_layers * 2


@dataclass(frozen=True)
class Machine:
    """GPUs of a server, all together: memory (bytes), peak bandwidth (bytes/s), dense fp16 arithmetic (FLOP/s)."""

    name: str
    memory: float
    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Efficiency:
    """The shares of a machine's peaks that a serving system reaches, host work between steps included."""

    weights: float
    arithmetic: float
    attention: float


class TimeModel(Protocol):
    """How long a step takes."""

    def seconds(self, num_tokens: int, num_context_tokens: int) -> float:
        """For a step that computes and attends to so many tokens, in seconds."""
        ...


@dataclass(frozen=True)
class StepTime:
    """Seconds: for a step, for each token computed in it, for each token whose K/V is read in it."""

    fixed: float
    per_token: float
    per_context_token: float

    def seconds(self, num_tokens: int, num_context_tokens: int) -> float:
        return self.fixed + self.per_token * num_tokens + self.per_context_token * num_context_tokens


def step_time(model: ModelCost, machine: Machine, efficiency: Efficiency) -> StepTime:
    """A step reads the weights once, multiplies each token by them (2 FLOP a parameter), and reads the K/V."""
    return StepTime(
        fixed=model.weight_bytes / (machine.bandwidth * efficiency.weights),
        per_token=2 * model.num_parameters / (machine.flops * efficiency.arithmetic),
        per_context_token=model.kv_bytes_per_token / (machine.bandwidth * efficiency.attention),
    )


@dataclass(frozen=True)
class Observation:
    """The mean step of a system: how long it took, how many tokens it computed and how many it attended to."""

    seconds: float
    num_tokens: float
    num_context_tokens: float


def observe(batched: float, rate: float, lengths: LogNormalLengths) -> Observation:
    """The mean step behind an average batch (figure 13), by Little's law.

    A request takes part in `output_mean` steps, so batched = rate * output_mean * seconds, if the system kept up.
    """
    return Observation(
        seconds=batched / (rate * lengths.output_mean),
        num_tokens=batched * (1 + lengths.prompt_mean / lengths.output_mean),
        num_context_tokens=batched * lengths.mean_context(),
    )


def fit_efficiency(
    model: ModelCost, machine: Machine, first: Observation, second: Observation, attention: float
) -> Efficiency:
    """The efficiencies of weights and arithmetic under which two observed steps take as long as they took."""
    per_context_token = model.kv_bytes_per_token / (machine.bandwidth * attention)
    rest_first = first.seconds - per_context_token * first.num_context_tokens
    rest_second = second.seconds - per_context_token * second.num_context_tokens
    per_token = (rest_second - rest_first) / (second.num_tokens - first.num_tokens)
    fixed = rest_first - per_token * first.num_tokens
    return Efficiency(
        weights=model.weight_bytes / (machine.bandwidth * fixed),
        arithmetic=2 * model.num_parameters / (machine.flops * per_token),
        attention=attention,
    )


OPT_13B = ModelCost("OPT-13B", 13e9, 40, 5120, 15_700)
OPT_66B = ModelCost("OPT-66B", 66e9, 64, 9216, 9_700)
OPT_175B = ModelCost("OPT-175B", 173e9, 96, 12288, 60_100)
A100_40GB = Machine("A100", 40e9, 1.555e12, 312e12)
EIGHT_A100_80GB = Machine("8 x A100-80GB", 640e9, 8 * 2.039e12, 8 * 312e12)

# Attention is taken to reach 85 % of the bandwidth; the paper says nothing of it.
_ATTENTION = 0.85
HARDWARE_LIMIT = Efficiency(weights=1.0, arithmetic=1.0, attention=1.0)


def paper_system() -> Efficiency:
    """The paper's own system, from the two mean batches of vLLM in figure 13 (OPT-13B)."""
    return fit_efficiency(
        OPT_13B, A100_40GB, observe(30.42, 2.0, SHAREGPT), observe(132.44, 30.0, ALPACA), attention=_ATTENTION
    )
