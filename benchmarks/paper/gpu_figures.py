"""Pictures and rows of what was measured on a GPU (benchmarks/paper/gpu), as far as it has been."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.paper import plots
from benchmarks.paper.gpu.panels import PANELS
from benchmarks.paper.gpu.record import FOLDER, Point, Record
from benchmarks.paper.runs import LABELS

NOTES = "one GPU, random weights; requests in real time, Poisson arrivals (docs/paper.md)"
FIGURES = {"fig12": "fig 12", "fig14": "fig 14", "fig16": "fig 16", "fig17": "fig 17"}


def records(folder: Path = FOLDER) -> dict[str, Record]:
    """What has been measured, by part."""
    return {path.stem: Record.load(path) for path in sorted(folder.glob("*.json"))}


def write(measured: dict[str, Record], simulated: list[report.Row]) -> None:
    """Draw everything there is and write benchmarks/results/paper_gpu.json; nothing if nothing has been measured.

    `simulated`: rows of what was simulated on measured step times.
    """
    draw: dict[str, Callable[[Record], list[report.Row]]] = {
        "fig18a": attention,
        "fig18b": block_sizes,
        "fig19": preemption,
    }
    rows = list(simulated)
    for part, record in measured.items():
        if part in PANELS:
            rows += rates(part, record)
        elif part in draw:
            rows += draw[part](record)
    if rows:
        report.write("paper_gpu", rows, NOTES, _source(measured))


def _source(measured: Mapping[str, Record]) -> report.Source:
    """Where and from what it was measured: which parts on which machine, where there was more than one."""
    parts: dict[tuple[str, str], list[str]] = {}
    for part, record in measured.items():
        parts.setdefault((record.source.machine, record.source.commit), []).append(part)
    machines = [f"{', '.join(of)}: {machine} (commit {commit})" for (machine, commit), of in parts.items()]
    sources = [record.source for record in measured.values()]
    last = max(sources, key=lambda source: source.date)
    commands = dict.fromkeys(source.command for source in sources)
    machine = last.machine if len(machines) == 1 else "; ".join(machines)
    return report.Source(machine, last.date, last.commit, " && ".join(commands))


def rates(part: str, record: Record) -> list[report.Row]:
    """What each system sustains, and its latency at rates around that."""
    panels = [panel for panel in PANELS[part]() if _sustained(record, panel.name)]
    if part == "fig14":
        panels.sort(key=lambda panel: panel.name.split()[::-1])  # not in the order in which they are measured
    title = f"gpu {FIGURES[part]}"
    rows = []
    with plots.figure(_name(title), columns=max(min(len(panels), 3), 1), rows=-(-len(panels) // 3) or 1) as axes:
        for axis, panel in zip(axes, panels, strict=False):
            sustained = _sustained(record, panel.name)
            axis.set_title(panel.name)
            if any(len(_latencies(record, panel.name, system)) > 1 for system in sustained):
                _draw_latencies(axis, record, panel.name, sustained)
            else:
                axis.barh([LABELS[system] for system in sustained], list(sustained.values()), color=_colors(sustained))
                axis.invert_yaxis()
                axis.grid(visible=False, axis="y")
                axis.set_xlabel("sustained requests/s")
            own = sustained.get("paged", 0.0)
            rows += [
                _row(f"{title}: {panel.name}, against {LABELS[system]}", own, "req/s", f"{LABELS[system]} policy", rate)
                for system, rate in sustained.items()
                if system != "paged" and own
            ]
    return rows


def _draw_latencies(axis: Any, record: Record, panel: str, sustained: Mapping[str, float]) -> None:
    for system, rate in sustained.items():
        style = {"color": plots.COLORS[system], "marker": plots.MARKERS[system], "label": LABELS[system]}
        points = _latencies(record, panel, system)
        at = [point.values["rate"] for point in points]
        axis.plot(at, [point.values["normalized_latency"] for point in points], markersize=4, **style)
        axis.axvline(rate, color=plots.COLORS[system], linestyle=":", linewidth=1)
    axis.set_xlabel("requests/s (dotted: sustained)")
    axis.set_ylabel("normalized latency (s/token)")
    axis.set_xlim(0, None)
    axis.set_ylim(0, None)
    axis.legend()


def attention(record: Record) -> list[report.Row]:
    """Figure 18a: the paged kernel against itself on consecutive blocks and torch on contiguous K/V; and by block size."""
    cases = [point for point in record.points if len(point.key) == 3]
    sizes = [point for point in record.points if len(point.key) == 4]
    with plots.figure("gpu_fig18a", columns=2, size=(4.6, 3.0)) as (left, right):
        groups = [" ".join(point.key[1:]).replace(" context ", "\n").replace("batch ", "b") for point in cases]
        series = [
            ("paged, blocks anywhere", plots.COLORS["paged"], [point.values["paged_us"] for point in cases]),
            ("the same, consecutive", plots.PAPER_COLOR, [point.values["consecutive_us"] for point in cases]),
            ("torch, contiguous", plots.COLORS["orca_oracle"], [point.values["torch_us"] for point in cases]),
        ]
        plots.bars(left, groups, series, digits=None)
        left.set_ylabel("attention of one layer (us)")
        left.legend()
        names = [point.key[3].removeprefix("blocks of ") for point in sizes]
        plots.bars(
            right, names, [("paged", plots.COLORS["paged"], [point.values["paged_us"] for point in sizes])], digits=0
        )
        right.set_xlabel("block size (tokens)")
        right.set_ylabel("batch 32, context 1024 (us)")
    rows = []
    for point in cases:
        name, own = f"gpu fig 18a: {', '.join(point.key[1:])}", point.values["paged_us"]
        rows.append(_row(name, own, "us", "same kernel, consecutive blocks", point.values["consecutive_us"]))
        rows.append(_row(name, own, "us", "torch on contiguous K/V", point.values["torch_us"]))
    base = next((point.values["paged_us"] for point in sizes if point.key[3] == "blocks of 16"), None)
    if base is not None:
        rows += [
            _row(f"gpu fig 18a: {point.key[3]}", point.values["paged_us"], "us", "blocks of 16", base)
            for point in sizes
        ]
    return rows


def block_sizes(record: Record) -> list[report.Row]:
    """Figure 18b, end to end: what the engine sustains by block size."""
    rows = []
    names = list(dict.fromkeys(point.key[1] for point in record.points))
    with plots.figure("gpu_fig18b", columns=max(len(names), 1), size=(4.0, 2.8)) as axes:
        for axis, name in zip(axes, names, strict=False):
            points = [point for point in record.points if point.key[1] == name]
            sustained = [point.values["sustained"] for point in points]
            groups = [point.key[3].removeprefix("blocks of ") for point in points]
            plots.bars(axis, groups, [("paged", plots.COLORS["paged"], sustained)], digits=2)
            axis.set_title(name)
            axis.set_xlabel("block size (tokens)")
            axis.set_ylabel("sustained requests/s")
            base = next((point.values["sustained"] for point in points if point.key[3] == "blocks of 16"), None)
            if base is not None:
                rows += [
                    _row(
                        f"gpu fig 18b: {name}, {point.key[3]}", point.values["sustained"], "req/s", "blocks of 16", base
                    )
                    for point in points
                ]
    return rows


def preemption(record: Record) -> list[report.Row]:
    """Figure 19: what moving a request's blocks takes, and the engine's output when it swaps and when it recomputes."""
    swaps = [point for point in record.points if point.key[0] == "swap"]
    served = [point for point in record.points if point.key[0] == "saturation"]
    sizes = list(dict.fromkeys(point.key[3] for point in served))
    with plots.figure("gpu_fig19", columns=2, size=(4.4, 2.9)) as (left, right):
        for name, label in (("out_ms", "out"), ("in_ms", "in")):
            places = [int(point.key[1].removeprefix("blocks of ")) for point in swaps]
            left.plot(places, [point.values[name] for point in swaps], marker="o", markersize=4, label=f"swap {label}")
        left.set_xscale("log", base=2)
        left.set_ylim(0, None)
        left.set_xlabel("block size (tokens)")
        left.set_ylabel("512 tokens (ms)")
        left.legend()
        series = []
        for mode, color in (("recompute", plots.COLORS["orca_oracle"]), ("swap", plots.COLORS["paged"])):
            values = {
                point.key[3]: point.values["output_tokens_per_second"] for point in served if point.key[4] == mode
            }
            series.append((mode, color, [values.get(size, 0.0) for size in sizes]))
        if sizes:
            plots.bars(right, [size.removeprefix("blocks of ") for size in sizes], series, digits=0)
            right.legend()
        right.set_xlabel("block size (tokens)")
        right.set_ylabel("output tokens/s, saturated")
    rows = []
    for point in swaps:
        name = f"gpu fig 19: 512 tokens, {point.key[1]}"
        rows.append(_row(f"{name}, swapped out", point.values["out_ms"], "ms", "swapped in", point.values["in_ms"]))
    for size in sizes:
        modes = {point.key[4]: point.values["output_tokens_per_second"] for point in served if point.key[3] == size}
        if len(modes) == 2:
            rows.append(
                _row(f"gpu fig 19: swapping, {size}", modes["swap"], "tok/s", "recomputing", modes["recompute"])
            )
    return rows


def _sustained(record: Record, panel: str) -> dict[str, float]:
    points: list[Point] = [point for point in record.points if point.key[:2] == ("saturation", panel)]
    return {point.key[2]: point.values["sustained"] for point in points if point.values["sustained"] > 0}


def _latencies(record: Record, panel: str, system: str) -> list[Point]:
    points = [point for point in record.points if point.key[:3] == ("latency", panel, system)]
    return sorted(points, key=lambda point: point.values["rate"])


def _colors(systems: Iterable[str]) -> list[str]:
    return [plots.COLORS[system] for system in systems]


def _row(name: str, value: float, unit: str, peer: str, peer_value: float) -> report.Row:
    return report.row(name, value, unit, peer, peer_value, higher_is_better=unit in ("req/s", "tok/s"))


def _name(title: str) -> str:
    return title.replace("gpu fig ", "gpu_fig")
