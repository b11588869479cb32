"""Draw the H100 results of benchmarks/results: docs/h100_engine.png and docs/h100_server.png.

Usage: python benchmarks/gpu_plots.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("Llama-3.1-8B shape", "Qwen3-0.6B shape")


def load(name: str) -> list[dict[str, Any]]:
    """The rows of a result file."""
    rows: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))[
        "rows"
    ]
    return rows


def series(rows: list[dict[str, Any]], pattern: str, peer: str) -> dict[int, tuple[float, float]]:
    """By the number that `pattern` captures: our figure and the peer's."""
    found = [(re.fullmatch(pattern, row["name"]), row) for row in rows if row["peer"] == peer]
    return {int(match[1]): (row["value"], row["peer_value"]) for match, row in found if match}


def draw_engine() -> None:
    """Decode steps: ours, vLLM's and the floor."""
    rows = load("h100_engine")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for panel, shape in zip(panels, SHAPES, strict=True):
        pattern = rf"{re.escape(shape)}, decode step, batch (\d+)"
        beside, floor = series(rows, pattern, "vLLM"), series(rows, pattern, "floor")
        bars = (
            ("floor", "#bbbbbb", floor, 1),
            ("pagedcore", "#1b6ca8", beside, 0),
            ("vLLM 0.26", "#e07b39", beside, 1),
        )
        for number, (label, colour, values, which) in enumerate(bars):
            places = [i + (number - 1) * 0.27 for i in range(len(values))]
            heights = [pair[which] for pair in values.values()]
            drawn = panel.bar(places, heights, 0.26, label=label, color=colour)
            panel.bar_label(drawn, [f"{height:.2g}" for height in heights], fontsize=6)
        panel.set_xticks(range(len(beside)), [str(batch) for batch in beside])
        panel.set(title=f"{shape}: decode step", xlabel="sequences", ylabel="ms")
        panel.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "h100_engine.png", dpi=130)


def draw_server() -> None:
    """Throughput against concurrency: the engine, through the server, and the official backend, where it was measured."""
    rows = load("h100_server")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for panel, shape in zip(panels, SHAPES, strict=True):
        pattern = rf"{re.escape(shape)}, (\d+) streams, output"
        values, official = series(rows, pattern, "own engine, no server"), series(rows, pattern, "vllm_backend")
        lines = (
            ("engine, no server", values, 1, "o-", "#1b6ca8"),
            ("through tritonserver", values, 0, "s--", "#3a9d5d"),
            ("vllm_backend", official, 1, "^-", "#e07b39"),
        )
        for label, of, which, style, colour in lines:
            if of:
                panel.plot(list(of), [pair[which] for pair in of.values()], style, color=colour, label=label)
        panel.set(title=shape, xlabel="concurrent streams", ylabel="output tokens/s", ylim=(0, None))
        panel.set_xticks(list(values))
        panel.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "h100_server.png", dpi=130)


if __name__ == "__main__":
    draw_engine()
    draw_server()
