"""What is served in real time for each figure: traces, memory and systems."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.paper.gpu.serving import EngineSetup
from benchmarks.paper.workloads import (
    ALPACA,
    SHAREGPT,
    TRANSLATION,
    BeamTrace,
    ChatTrace,
    LengthSource,
    PlainTrace,
    SharedPrefixTrace,
    Trace,
)

PAPER_SLOTS = 15_700  # of OPT-13B and LLaMA-13B on the paper's A100 (table 1)
POLICIES = ("paged", "orca_oracle", "orca_pow2", "orca_max", "static_batch")
SHARE_NOTHING = ("paged", "orca_oracle", "orca_max")


@dataclass(frozen=True)
class Panel:
    """One picture's worth: systems under a trace. `num_slots`: None: all that the GPU has room for.

    `mean_output`: output tokens of a request, all its samples together. `seconds`: of a run, long enough for several requests
    one after the other.
    """

    name: str
    trace: Trace
    mean_output: float
    seconds: float
    systems: tuple[EngineSetup, ...]


def _systems(policies: tuple[str, ...], num_slots: int | None = PAPER_SLOTS) -> tuple[EngineSetup, ...]:
    return tuple(EngineSetup(policy, num_slots) for policy in policies)


def _plain(name: str, lengths: LengthSource, mean: float, seconds: float, num_slots: int | None) -> Panel:
    policies = POLICIES if num_slots is not None else SHARE_NOTHING
    return Panel(name, PlainTrace(lengths), mean, seconds, _systems(policies, num_slots))


def figure_12() -> list[Panel]:
    """Both data sets with the paper's memory, and with all there is: the paper's negative case, much memory for short sequences."""
    return [
        _plain("ShareGPT", SHAREGPT, SHAREGPT.output_mean, 36.0, PAPER_SLOTS),
        _plain("Alpaca", ALPACA, ALPACA.output_mean, 14.0, PAPER_SLOTS),
        _plain("Alpaca, all memory", ALPACA, ALPACA.output_mean, 14.0, None),
        _plain("ShareGPT, all memory", SHAREGPT, SHAREGPT.output_mean, 36.0, None),
    ]


def figure_14() -> list[Panel]:
    """Samples and beams of Alpaca."""
    found = []
    for kind, make in (("beams", BeamTrace), ("samples", PlainTrace)):
        for width in (6, 2, 4):
            systems = _systems(SHARE_NOTHING)
            trace: Trace = make(ALPACA, width)
            found.append(Panel(f"{width} {kind}", trace, width * ALPACA.output_mean, 14.0, systems))
    return found


def figure_16() -> list[Panel]:
    """A prefix that the prefix cache shares, and Orca (Oracle) does not."""
    systems = (EngineSetup("paged", PAPER_SLOTS, enable_prefix_caching=True), EngineSetup("orca_oracle", PAPER_SLOTS))
    return [
        Panel(
            f"prefix of {length} tokens", SharedPrefixTrace(TRANSLATION, length), TRANSLATION.output_mean, 14.0, systems
        )
        for length in (341, 80)
    ]


def figure_17() -> list[Panel]:
    """Chat, nothing kept between rounds."""
    systems = _systems(("paged", "orca_oracle", "orca_pow2", "orca_max"))
    return [Panel("chat", ChatTrace(SHAREGPT), SHAREGPT.output_mean, 36.0, systems)]


PANELS = {"fig12": figure_12, "fig14": figure_14, "fig16": figure_16, "fig17": figure_17}
