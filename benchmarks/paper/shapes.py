"""Table 1 and figures 1 (left), 3 and 11: what follows from shapes, from the anatomy of a reservation, and from lengths."""

from __future__ import annotations

import numpy as np

from benchmarks import report
from benchmarks.paper import plots
from benchmarks.paper.memory_use import MemoryUse, classify
from benchmarks.paper.step_time import A100_40GB, HARDWARE_LIMIT, OPT_13B, OPT_66B, OPT_175B, paper_system, step_time
from benchmarks.paper.workloads import ALPACA, AZURE, MOONCAKE, SHAREGPT, SHAREGPT_8K, LengthSource, LogNormalLengths
from pagedcore._core import ContiguousManager

# Table 1: GB left for K/V, and thousands of slots.
TABLE_1 = ((OPT_13B, 12, 15.7), (OPT_66B, 21, 9.7), (OPT_175B, 264, 60.1))


def table_1() -> list[report.Row]:
    """Slots from shape and memory. The table's come out when its "GB" of K/V are taken as GiB."""
    return [
        paper_row(
            f"table 1: {model.name}, slots in {memory} GiB",
            memory * 2**30 / model.kv_bytes_per_token / 1000,
            "thousand",
            slots,
        )
        for model, memory, slots in TABLE_1
    ]


def step_times() -> list[report.Row]:
    """The model of a step's time, against the least that the hardware allows."""
    own, limit = (step_time(OPT_13B, A100_40GB, reached) for reached in (paper_system(), HARDWARE_LIMIT))
    parts = (
        ("a step", "ms", 1e3, own.fixed, limit.fixed),
        ("a token computed in it", "us", 1e6, own.per_token, limit.per_token),
        ("a token attended to in it", "us", 1e6, own.per_context_token, limit.per_context_token),
    )
    return [
        report.row(f"step time: {name}", value * scale, unit, "hardware limit", least * scale, higher_is_better=False)
        for name, unit, scale, value, least in parts
    ]


def figure_1_left() -> list[report.Row]:
    """What a 13B model leaves of 40 GB for K/V."""
    kv = OPT_13B.num_slots * OPT_13B.kv_bytes_per_token
    parts = {
        "parameters": OPT_13B.weight_bytes,
        "K/V cache": kv,
        "activations, other": A100_40GB.memory - OPT_13B.weight_bytes - kv,
    }
    percent = {name: 100 * size / A100_40GB.memory for name, size in parts.items()}
    with plots.figure("fig01_left", size=(4.2, 2.9)) as (axis,):
        colors = ("#8f979e", plots.COLORS["paged"], plots.PAPER_COLOR)
        labels = [f"{name}\n{share:.0f} %" for name, share in percent.items()]
        axis.pie(percent.values(), labels=labels, colors=colors, startangle=90, wedgeprops={"width": 0.5})
        axis.set_title("13B parameters on 40 GB")
    return [
        paper_row("fig 1: parameters of OPT-13B, share of 40 GB", percent["parameters"], "%", 65),
        paper_row("fig 1: K/V cache, share of 40 GB", percent["K/V cache"], "%", 30),
    ]


def anatomy() -> dict[str, MemoryUse]:
    """Figure 3 on the buddy system: request A (at most 2048 tokens) and request B (at most 512).

    A: a prompt of 7, 1 token generated, 2 to come. B: a prompt of 3, 1 generated, 1 to come.
    """
    manager = ContiguousManager(2048 + 512 + 16, 1)
    requests = {"A": (2048, 8, 10), "B": (512, 4, 5)}
    uses = {}
    for seq_id, (name, (reservation, computed, final)) in enumerate(requests.items()):
        free_before = manager.num_free_blocks
        manager.add(seq_id)
        assert manager.grow(seq_id, reservation, 0)
        taken = free_before - manager.num_free_blocks
        uses[name] = classify([computed], [final], [reservation], taken, num_free=0, anyone_waits=False)
    return uses


def figure_3() -> list[report.Row]:
    paper = {"A": (2, 2038), "B": (1, 507)}
    uses = anatomy()
    with plots.figure("fig03", size=(6.4, 1.7)) as (axis,):
        for place, use in enumerate(uses.values()):
            left = 0.0
            pieces = (("token states", use.token_states), ("reserved", use.reserved), ("never used", use.internal))
            for (label, slots), color in zip(pieces, ("#1b6ca8", "#e9b44c", "#b8433c"), strict=True):
                width = np.log2(1 + slots)
                text = label if place == 0 else None
                axis.barh(place, width, left=left, color=color, label=text, height=0.6, edgecolor="white")
                axis.text(left + width / 2, place, f"{slots:.0f}", ha="center", va="center", fontsize=8)
                left += width
        axis.set_yticks(range(len(uses)), [f"request {name}" for name in uses])
        axis.set_xticks([])
        axis.set_xlabel("slots of a contiguous reservation (widths: logarithms)")
        axis.grid(visible=False)
        axis.invert_yaxis()
        plots.legend_below(axis, columns=3)
    rows = []
    for name, use in uses.items():
        rows += [
            paper_row(f"fig 3: request {name}, reserved", use.reserved, "slots", paper[name][0]),
            paper_row(f"fig 3: request {name}, never used", use.internal, "slots", paper[name][1]),
        ]
    return rows


def figure_11() -> list[report.Row]:
    """The sampled lengths: their means against the paper's, and the published traces beside them."""
    rows = []
    sources: list[LengthSource] = [SHAREGPT, ALPACA, AZURE, SHAREGPT_8K, MOONCAKE]
    with plots.figure("fig11", columns=3, rows=2, size=(3.3, 2.4)) as axes:
        for axis, source in zip(axes, sources, strict=False):
            lengths = source.sample(20_000, seed=3)
            edges = np.linspace(0, 250 if source is ALPACA else 2048, 50)
            for values, label, color in (
                (lengths.prompts, "prompt", "#e08e2b"),
                (lengths.outputs, "output", "#1b6ca8"),
            ):
                weights = np.full(len(values), 100 / len(values))
                name = f"{label}, mean {values.mean():.1f}"
                axis.hist(values, edges, weights=weights, alpha=0.7, color=color, label=name)
            axis.set_title(source.name)
            axis.margins(y=0.35)
            axis.legend()
            axis.set_xlabel("tokens")
            axis.set_ylabel("% of requests")
            if isinstance(source, LogNormalLengths):
                means = (
                    ("prompt", lengths.prompts, source.prompt_mean),
                    ("output", lengths.outputs, source.output_mean),
                )
                rows += [
                    paper_row(f"fig 11: {source.name}, mean {kind}", values.mean(), "tokens", mean)
                    for kind, values, mean in means
                ]
        axes[-1].axis("off")
    return rows


def paper_row(name: str, value: float, unit: str, paper: float) -> report.Row:
    """A figure of ours beside the paper's; the ratio is ours / the paper's and judges nothing."""
    return report.row(name, float(value), unit, "paper", paper, higher_is_better=True)
