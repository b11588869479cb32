"""Figures 12, 14, 16 and 17: normalized latency against request rate, simulated, under each memory policy."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import report
from benchmarks.paper import plots
from benchmarks.paper.memory import opt_13b
from benchmarks.paper.runs import LABELS, POLICIES, Point, Sweep, sustained_rate
from benchmarks.paper.shapes import paper_row
from benchmarks.paper.simulator import SimulationConfig
from benchmarks.paper.step_time import (
    A100_40GB,
    EIGHT_A100_80GB,
    HARDWARE_LIMIT,
    OPT_13B,
    OPT_175B,
    TimeModel,
    paper_system,
    step_time,
)
from benchmarks.paper.workloads import (
    ALPACA,
    SHAREGPT,
    TRANSLATION,
    BeamTrace,
    ChatTrace,
    PlainTrace,
    SharedPrefixTrace,
    Trace,
)

LIMIT = 1.0  # s/token: where the paper's axes end
SUSTAINED = 0.2  # s/token: at this latency rates are compared
# Rates are these multiples of a rough guess at what a system sustains (requests/s).
MULTIPLES = (0.3, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5)
SHAREGPT_GUESS = {"paged": 1.9, "orca_oracle": 1.2, "orca_pow2": 0.95, "orca_max": 0.65, "static_batch": 0.3}
ALPACA_GUESS = {"paged": 32.0, "orca_oracle": 22.5, "orca_pow2": 16.5, "orca_max": 4.5, "static_batch": 1.3}
LARGE_GUESS = {"paged": 25.0, "orca_oracle": 25.0, "orca_pow2": 21.0, "orca_max": 10.0, "static_batch": 1.75}
PREFIX_GUESS = {80: {"paged": 33.0, "orca_oracle": 16.0}, 341: {"paged": 26.0, "orca_oracle": 5.5}}
# By number of samples (figure 14).
SAMPLES_GUESS = {
    2: {"paged": 17.0, "orca_oracle": 12.0, "orca_pow2": 8.0, "orca_max": 2.2},
    4: {"paged": 9.5, "orca_oracle": 6.0, "orca_pow2": 4.0, "orca_max": 1.1},
    6: {"paged": 6.5, "orca_oracle": 4.0, "orca_pow2": 2.7, "orca_max": 0.7},
}
BEAMS_GUESS = {
    2: {"paged": 20.0, "orca_oracle": 12.0, "orca_pow2": 8.0, "orca_max": 2.2},
    4: {"paged": 12.0, "orca_oracle": 6.0, "orca_pow2": 4.0, "orca_max": 1.1},
    6: {"paged": 8.0, "orca_oracle": 4.0, "orca_pow2": 2.7, "orca_max": 0.7},
}
CHAT_GUESS = {"paged": 0.9, "paged_cached": 0.9, "orca_oracle": 0.6, "orca_pow2": 0.6, "orca_max": 0.6}
FIGURE_14_BEAMS = 2.3  # against Orca (Oracle), with beams of six (section 6.3)
FIGURE_16 = {80: 1.67, 341: 3.58}


def opt_175b(policy: str) -> SimulationConfig:
    """OPT-175B on eight A100-80GB, at the efficiencies of the paper's system on OPT-13B: much memory, slow steps."""
    time = step_time(OPT_175B, EIGHT_A100_80GB, paper_system())
    return SimulationConfig(policy, time, OPT_175B.num_slots, max_num_seqs=512)


def sweeps(gpu_time: TimeModel | None) -> dict[tuple[str, ...], Sweep]:
    """All runs of this file, by what they are for; the last part of a key is the system.

    `gpu_time`: the step times of a GPU, where they have been measured.
    """
    fastest = step_time(OPT_13B, A100_40GB, HARDWARE_LIMIT)
    found: dict[tuple[str, ...], Sweep] = {}

    def add(
        key: tuple[str, ...],
        config: SimulationConfig,
        trace: Trace,
        guess: float,
        seconds: float,
        limit: float = LIMIT,
    ) -> None:
        rates = tuple(round(guess * multiple, 3) for multiple in MULTIPLES)
        found[key] = Sweep(config, trace, rates, seconds, limit)

    for policy in POLICIES:
        sharegpt = SHAREGPT_GUESS[policy]
        add(("fig 12", "ShareGPT", policy), opt_13b(policy), PlainTrace(SHAREGPT), sharegpt, 900)
        add(("fastest", policy), opt_13b(policy, fastest), PlainTrace(SHAREGPT), 1.6 * sharegpt, 400)
        if gpu_time is not None:
            add(("gpu steps", policy), opt_13b(policy, gpu_time), PlainTrace(SHAREGPT), 1.8 * sharegpt, 400)
        add(("fig 12", "Alpaca", policy), opt_13b(policy), PlainTrace(ALPACA), ALPACA_GUESS[policy], 300)
        add(("large", policy), opt_175b(policy), PlainTrace(ALPACA), LARGE_GUESS[policy], 200)
    for method, make_trace, all_guesses in (("samples", PlainTrace, SAMPLES_GUESS), ("beams", BeamTrace, BEAMS_GUESS)):
        for width, guesses in all_guesses.items():
            for policy, guess in guesses.items():
                config = replace(opt_13b(policy), max_num_seqs=512)
                add(("fig 14", method, str(width), policy), config, make_trace(ALPACA, width), guess, 240, LIMIT / 2)
    for prefix_len, guesses in PREFIX_GUESS.items():
        trace = SharedPrefixTrace(TRANSLATION, prefix_len)
        for policy, guess in guesses.items():
            config = replace(opt_13b(policy), enable_prefix_caching=policy == "paged")
            add(("fig 16", str(prefix_len), policy), config, trace, guess, 120)
    for name, guess in CHAT_GUESS.items():
        policy = name.removesuffix("_cached")
        config = replace(opt_13b(policy), enable_prefix_caching=policy != name)
        add(("fig 17", name), config, ChatTrace(SHAREGPT), guess, 600)
    return found


def _curves(points: dict[tuple[str, ...], list[Point]], *key: str) -> dict[str, list[Point]]:
    return {name[-1]: run for name, run in points.items() if name[:-1] == key}


def rate_of(points: dict[tuple[str, ...], list[Point]], *key: str) -> float:
    """The rate that a system sustains."""
    return sustained_rate(points[key], SUSTAINED)


def _gains(title: str, curves: dict[str, list[Point]], own: str = "paged") -> list[report.Row]:
    """The rate that is sustained, against that of every other system."""
    rates = {name: sustained_rate(curve, SUSTAINED) for name, curve in curves.items()}
    return [
        report.row(
            f"{title}, against {LABELS[name]}",
            rates[own],
            "req/s",
            f"{LABELS[name]} policy",
            rate,
            higher_is_better=True,
        )
        for name, rate in rates.items()
        if name in LABELS and name != own
    ]


def figure_12(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """OPT-13B, both data sets, and the paper's own exception: a large model with much memory and short sequences."""
    panels = {
        "ShareGPT, OPT-13B": _curves(points, "fig 12", "ShareGPT"),
        "Alpaca, OPT-13B": _curves(points, "fig 12", "Alpaca"),
        "Alpaca, OPT-175B": _curves(points, "large"),
    }
    with plots.figure("fig12", columns=3, size=(3.7, 2.9)) as axes:
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            plots.latency_curves(axis, curves)
            axis.set_title(f"{title} (simulated)")
        plots.legend_below(axes[0], columns=5)
    rows = []
    for title, curves in panels.items():
        rows += _gains(f"fig 12: {title}", curves)
    return rows + _gains("fig 12 on faster steps: ShareGPT, OPT-13B", _curves(points, "fastest"))


def on_gpu_steps(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """Figure 12 with the step times measured on a GPU; nothing where there are none."""
    curves = _curves(points, "gpu steps")
    if not curves:
        return []
    with plots.figure("gpu_steps", size=(4.4, 3.0)) as (axis,):
        plots.latency_curves(axis, curves)
        axis.set_title("ShareGPT (simulated on measured steps)")
        axis.legend()
    return _gains("gpu steps: ShareGPT", curves)


def figure_14(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """Samples and beams: the paged engine shares what they have in common, the others have a sequence for each."""
    rows = []
    with plots.figure("fig14", columns=3, rows=2, size=(3.7, 2.7)) as axes:
        panels = [(method, width) for method in ("samples", "beams") for width in SAMPLES_GUESS]
        for axis, (method, width) in zip(axes, panels, strict=True):
            curves = _curves(points, "fig 14", method, str(width))
            plots.latency_curves(axis, curves)
            axis.set_title(f"Alpaca, {width} {method} (simulated)")
            rows += _gains(f"fig 14: {width} {method}", curves)
        plots.legend_below(axes[0], columns=4)
    own, oracle = (rate_of(points, "fig 14", "beams", "6", policy) for policy in ("paged", "orca_oracle"))
    return [*rows, paper_row("fig 14: 6 beams, against Orca (Oracle), gain", own / oracle, "x", FIGURE_14_BEAMS)]


def figure_16(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """A prefix that all requests share, kept by the prefix cache, against Orca (Oracle), which cannot share it."""
    rows = []
    with plots.figure("fig16", columns=2, size=(3.9, 2.9)) as axes:
        for axis, prefix_len in zip(axes, PREFIX_GUESS, strict=True):
            curves = _curves(points, "fig 16", str(prefix_len))
            plots.latency_curves(axis, curves)
            axis.set_title(f"shared prefix of {prefix_len} tokens (simulated)")
            axis.legend()
            gain = _gains(f"fig 16: prefix of {prefix_len} tokens", curves)[0]
            rows += [
                gain,
                paper_row(f"fig 16: prefix of {prefix_len} tokens, gain", gain.ratio, "x", FIGURE_16[prefix_len]),
            ]
    return rows


def figure_17(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """Chat: the last 1024 tokens of a conversation are the prompt; K/V is not kept between rounds, and, beside it, it is."""
    curves = _curves(points, "fig 17")
    labels = LABELS | {"paged_cached": "pagedcore, prefix cache on"}
    with plots.figure("fig17", size=(4.4, 3.0)) as (axis,):
        plots.latency_curves(axis, curves, labels)
        axis.set_title("chat (simulated)")
        axis.legend()
    rows = _gains("fig 17: chat", curves)
    rows += [paper_row(f"{row.name}, gain", row.ratio, "x", 2.0) for row in rows]
    cached = sustained_rate(curves["paged_cached"], SUSTAINED)
    plain = sustained_rate(curves["paged"], SUSTAINED)
    rows.append(
        report.row(
            "fig 17: chat, prefix cache on", cached, "req/s", "pagedcore, nothing kept", plain, higher_is_better=True
        )
    )
    return rows
