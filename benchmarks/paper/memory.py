"""Figures 1 (right), 2 and 13: memory waste and batch size by memory policy, in a pool of exactly 15.7 thousand slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks import report
from benchmarks.paper import plots
from benchmarks.paper.memory_use import MemoryUse
from benchmarks.paper.runs import LABELS, Point, Sweep
from benchmarks.paper.shapes import paper_row
from benchmarks.paper.simulator import SimulationConfig, SimulationResult
from benchmarks.paper.step_time import A100_40GB, HARDWARE_LIMIT, OPT_13B, TimeModel, paper_system, step_time
from benchmarks.paper.workloads import ALPACA, AZURE, MOONCAKE, SHAREGPT, SHAREGPT_8K, PlainTrace
from pagedcore.engine.scheduler_config import SchedulerConfig

KINDS = ("token_states", "reserved", "internal", "external")
KIND_NAMES = ("token states", "reserved", "internal fragmentation", "external fragmentation & others")
KIND_COLORS = ("#1b6ca8", "#e9b44c", "#b8433c", "#b9bec4")
# Figure 2, in percent; of vLLM the paper gives the first only.
FIGURE_2 = {
    "orca_max": (20.4, 13.3, 57.3, 8.9),
    "orca_pow2": (26.8, 17.9, 13.6, 41.6),
    "orca_oracle": (38.2, 25.2, 0.0, 36.6),
    "paged": (96.3, 3.7, 0.0, 0.0),
}
FIGURE_13 = {
    "ShareGPT": {"orca_max": 7.00, "orca_pow2": 9.81, "orca_oracle": 13.62, "paged": 30.42},
    "Alpaca": {"orca_max": 7.00, "orca_pow2": 43.24, "orca_oracle": 72.75, "paged": 132.44},
}
LOADS = {"ShareGPT": (SHAREGPT, 2.0, 1800.0), "Alpaca": (ALPACA, 30.0, 600.0)}
# Rates at which every policy has requests waiting.
PUBLISHED = {"Azure": (AZURE, 2.0), "ShareGPT 8k": (SHAREGPT_8K, 2.0), "Mooncake": (MOONCAKE, 2.0)}
BLOCK_SIZE = 16
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WASTE_RATES = (1.5, 1.8, 1.9, 2.0)  # requests/s: from a queue that is mostly empty to one that never is
# Shares of the pool that admission leaves free.
MARGINS = (0.0, 0.01, 0.04)
CAUSES = ("last_block", "ahead", "margin", "returning", "new")
CAUSE_NAMES = (
    "empty slots of last blocks",
    "blocks for later chunks of prompts",
    "free: the margin of admission",
    "free: too few for a preempted request",
    "free: too few for the next prompt",
)
CAUSE_COLORS = ("#e9b44c", "#8f979e", "#7d6b9e", "#3d9a5b", "#b9bec4")
BATCH_LIMITS = (1, 2, 4, 7, 10, 15, 20, 25, 30, 35, 40)


def opt_13b(
    policy: str,
    time: TimeModel | None = None,
    block_size: int = BLOCK_SIZE,
    max_num_seqs: int = 256,
    *,
    with_memory: bool = False,
) -> SimulationConfig:
    """OPT-13B on the paper's A100, under a policy; the step time is the paper's system's unless one is given."""
    return SimulationConfig(
        policy,
        time or step_time(OPT_13B, A100_40GB, paper_system()),
        OPT_13B.num_slots,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        with_memory=with_memory,
    )


def sweeps() -> dict[tuple[str, ...], Sweep]:
    """All runs of this file, by what they are for."""
    fastest = step_time(OPT_13B, A100_40GB, HARDWARE_LIMIT)
    found: dict[tuple[str, ...], Sweep] = {}
    for policy in FIGURE_2:
        for name, (lengths, rate, seconds) in LOADS.items():
            found["load", name, policy] = Sweep(
                opt_13b(policy, with_memory=True), PlainTrace(lengths), (rate,), seconds
            )
            found["fastest", name, policy] = Sweep(opt_13b(policy, fastest), PlainTrace(lengths), (rate,), seconds / 2)
        for name, (source, rate) in PUBLISHED.items():
            found["published", name, policy] = Sweep(
                opt_13b(policy, with_memory=True), PlainTrace(source), (rate,), 600.0
            )
    for size in BLOCK_SIZES:
        config = opt_13b("paged", block_size=size, with_memory=True)
        found["block size", str(size)] = Sweep(config, PlainTrace(SHAREGPT), (2.0,), 900.0)
    for rate in WASTE_RATES:
        found["rate", str(rate)] = Sweep(opt_13b("paged", with_memory=True), PlainTrace(SHAREGPT), (rate,), 1800.0)
    for margin in MARGINS:
        config = replace(opt_13b("paged", with_memory=True), watermark=margin)
        found["margin", str(margin)] = Sweep(config, PlainTrace(SHAREGPT), (2.0,), 900.0)
    cached = replace(opt_13b("paged", with_memory=True), enable_prefix_caching=True)
    found[("prefix cache",)] = Sweep(cached, PlainTrace(SHAREGPT), (2.0,), 900.0)
    for policy in ("paged", "orca_max"):
        for limit in BATCH_LIMITS if policy == "paged" else BATCH_LIMITS[:4]:
            config = opt_13b(policy, max_num_seqs=limit)
            found["batch", policy, str(limit)] = Sweep(config, PlainTrace(SHAREGPT), (4.0,), 240.0)
    return found


def figure_1_right(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """Memory in use and throughput against the batch size; existing systems end at seven reservations."""
    with plots.figure("fig01_right", columns=2, size=(4.0, 2.9)) as (memory, throughput):
        for policy in ("orca_max", "paged"):
            results = [run[0].result for key, run in points.items() if key[:2] == ("batch", policy)]
            sizes = [result.batched for result in results]
            gigabytes = [
                (OPT_13B.weight_bytes + result.peak_slots * OPT_13B.kv_bytes_per_token) / 1e9 for result in results
            ]
            style = {"color": plots.COLORS[policy], "marker": plots.MARKERS[policy], "label": LABELS[policy]}
            memory.plot(sizes, gigabytes, markersize=4, **style)
            throughput.plot(sizes, [result.output_tokens_per_second for result in results], markersize=4, **style)
        memory.axhline(OPT_13B.weight_bytes / 1e9, color="#555", linewidth=0.8, linestyle="--", label="parameters")
        memory.set_ylim(0, 42)
        memory.set_ylabel("memory in use, at most (GB)")
        throughput.set_ylabel("output tokens/s (simulated)")
        throughput.set_ylim(0, None)
        for axis in (memory, throughput):
            axis.set_xlabel("batched requests")
            axis.legend()
    most = {policy: points["batch", policy, limit][0].result for policy, limit in (("paged", "40"), ("orca_max", "7"))}
    return [
        report.row(
            "fig 1: most output tokens/s",
            most["paged"].output_tokens_per_second,
            "tok/s",
            f"{LABELS['orca_max']} policy",
            most["orca_max"].output_tokens_per_second,
            higher_is_better=True,
        )
    ]


def figure_2(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """Shares of the K/V memory at 2 requests/s of ShareGPT, ours and the paper's side by side."""
    order = list(FIGURE_2)
    own = {policy: points["load", "ShareGPT", policy][0].result.memory.percent() for policy in order}
    with plots.figure("fig02", columns=2, size=(4.3, 3.4)) as (left, right):
        _draw_use(left, {LABELS[policy]: own[policy] for policy in order})
        left.set_title("this engine under each policy (simulated)")
        _draw_use(right, {(LABELS | {"paged": "vLLM"})[policy]: MemoryUse(*FIGURE_2[policy]) for policy in order})
        right.set_title("the paper (vLLM: all waste in one)")
        left.set_ylabel("% of K/V memory")
        plots.legend_below(left, columns=4)
    rows = []
    for policy in order:
        for kind, name, paper in zip(KINDS, KIND_NAMES, FIGURE_2[policy], strict=True):
            if paper and (policy != "paged" or kind == "token_states"):
                rows.append(paper_row(f"fig 2: {LABELS[policy]}, {name}", getattr(own[policy], kind), "%", paper))
    waste = 100 - own["paged"].token_states
    rows.append(report.row("fig 2: all waste", waste, "%", "vLLM in the paper", 3.7, higher_is_better=False))
    return rows


def waste_percent(result: SimulationResult) -> dict[str, float]:
    """Each cause of `PagedWaste` in percent of the K/V memory that is not idle."""
    scale = 100 / (result.memory.total - result.memory.idle)
    return {cause: scale * getattr(result.waste, cause) for cause in CAUSES}


def waste_by_cause(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """Of what the paged engine's waste in figure 2 is made, and what the margin of admission is worth."""
    rows = []

    def add(name: str, value: float, unit: str, peer: str, peer_value: float) -> None:
        rows.append(report.row(name, value, unit, peer, peer_value, higher_is_better=unit == "tok/s"))

    load = points["load", "ShareGPT", "paged"][0].result
    percent = waste_percent(load)
    total = sum(percent.values())
    for cause, name in zip(CAUSES, CAUSE_NAMES, strict=True):
        share = report.row(f"waste by cause: {name}", percent[cause], "%", "all causes", total, higher_is_better=True)
        rows.append(share)  # its ratio judges nothing
    half = 100 * load.batched * (BLOCK_SIZE - 1) / 2 / (load.memory.total - load.memory.idle)
    add(
        "waste by cause: empty slots of last blocks", percent["last_block"], "%", "half a block for each sequence", half
    )
    cached = points[("prefix cache",)][0].result
    revived = 100 * cached.revived_slots / (cached.memory.total - cached.memory.idle)
    held = sum(waste_percent(cached).values())
    add("waste by cause: all, where K/V that preempted requests find again counts", held - revived, "%", "held", held)
    for rate in WASTE_RATES:
        result = points["rate", str(rate)][0].result
        waits = f"{100 * result.saturated:.0f} % of the time a request waits"
        add(f"waste by rate: {rate:g} requests/s ({waits})", sum(waste_percent(result).values()), "%", "target", 2.0)
    default = points["margin", str(SchedulerConfig.watermark)][0].result
    for margin in MARGINS:
        result = points["margin", str(margin)][0].result
        name = f"margin: {100 * margin:g} % of the blocks left free by admission"
        add(f"{name}, all waste", sum(waste_percent(result).values()), "%", "target", 2.0)
        own, peer = result.output_tokens_per_second, default.output_tokens_per_second
        add(f"{name}, output", own, "tok/s", f"{100 * SchedulerConfig.watermark:g} %", peer)
        add(f"{name}, preemptions", max(result.preemptions, 1), "", "1 %", default.preemptions)
    return rows


def _draw_use(axis: Any, uses: dict[str, MemoryUse]) -> None:
    groups = [name.replace(" (", "\n(") for name in uses]
    layers = [
        (name, color, [getattr(use, kind) for use in uses.values()])
        for kind, name, color in zip(KINDS, KIND_NAMES, KIND_COLORS, strict=True)
    ]
    plots.stacked(axis, groups, layers)
    axis.set_ylim(0, 100)


def waste_by_block_size(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """What of the paged pool is wasted at each block size, by where it is lost."""
    percent = [waste_percent(points["block size", str(size)][0].result) for size in BLOCK_SIZES]
    with plots.figure("waste_by_block_size", size=(4.8, 2.9)) as (axis,):
        layers = [
            (name, color, [shares[cause] for shares in percent])
            for cause, name, color in zip(CAUSES, CAUSE_NAMES, CAUSE_COLORS, strict=True)
        ]
        plots.stacked(axis, [str(size) for size in BLOCK_SIZES], layers)
        axis.set_xlabel("block size (tokens)")
        axis.set_ylabel("waste, % of K/V memory")
        axis.legend()
    return [
        report.row(
            f"block size: all waste, blocks of {size}", sum(shares.values()), "%", "target", 2.0, higher_is_better=False
        )
        for size, shares in zip(BLOCK_SIZES, percent, strict=True)
    ]


def figure_13(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """Mean batch at the paper's rates."""
    rows = []
    with plots.figure("fig13", columns=2, size=(4.3, 3.0)) as axes:
        for axis, (name, paper) in zip(axes, FIGURE_13.items(), strict=True):
            own = {policy: points["load", name, policy][0].result.batched for policy in paper}
            names = LABELS | {"paged": "pagedcore (paper: vLLM)"}
            groups = [names[policy].replace(" (", "\n(") for policy in paper]
            series = [
                ("simulated", plots.COLORS["paged"], list(own.values())),
                ("paper", plots.PAPER_COLOR, list(paper.values())),
            ]
            plots.bars(axis, groups, series)
            axis.set_title(f"{name}, {LOADS[name][1]:g} requests/s")
            axis.set_ylabel("batched requests")
            axis.legend()
            rows += [
                paper_row(f"fig 13: {name}, {LABELS[policy]}", own[policy], "requests", paper[policy])
                for policy in paper
            ]
    for name in FIGURE_13:
        batches = {policy: points["fastest", name, policy][0].result.batched for policy in FIGURE_2}
        rows += [
            report.row(
                f"fig 13 on faster steps: {name}, batch against {LABELS[policy]}",
                batches["paged"],
                "requests",
                f"{LABELS[policy]} policy",
                batches[policy],
                higher_is_better=True,
            )
            for policy in ("orca_oracle", "orca_max")
        ]
    return rows


def published_traces(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """Figures 2 and 13 under lengths of published traces."""
    rows = []
    for name in PUBLISHED:
        results = {policy: points["published", name, policy][0].result for policy in FIGURE_2}
        paged = results["paged"]
        for policy, result in results.items():
            if policy == "paged":
                continue
            rows.append(
                report.row(
                    f"published lengths: {name}, token states against {LABELS[policy]}",
                    paged.memory.percent().token_states,
                    "%",
                    f"{LABELS[policy]} policy",
                    result.memory.percent().token_states,
                    higher_is_better=True,
                )
            )
            rows.append(
                report.row(
                    f"published lengths: {name}, batch against {LABELS[policy]}",
                    paged.batched,
                    "requests",
                    f"{LABELS[policy]} policy",
                    result.batched,
                    higher_is_better=True,
                )
            )
    return rows
