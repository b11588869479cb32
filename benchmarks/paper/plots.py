"""One style for all pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.paper.runs import LABELS, Point
from benchmarks.report import ROOT

FOLDER = ROOT / "docs" / "paper"
COLORS = {
    "paged": "#1b6ca8",
    "paged_cached": "#0b3c5d",
    "orca_oracle": "#e08e2b",
    "orca_pow2": "#3d9a5b",
    "orca_max": "#b8433c",
    "static_batch": "#7d6b9e",
}
MARKERS = {
    "paged": "o",
    "paged_cached": "D",
    "orca_oracle": "^",
    "orca_pow2": "s",
    "orca_max": "v",
    "static_batch": "x",
}
PAPER_COLOR = "#b9bec4"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6e9",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 110,
}


@contextmanager
def figure(name: str, columns: int = 1, rows: int = 1, size: tuple[float, float] = (4.6, 3.1)) -> Iterator[list[Any]]:
    """Axes, row by row, of a picture that is saved as docs/paper/`name`.png at the end. `size`: inches, of one of them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_STYLE):
        picture, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
        every = [axis for line in axes for axis in line]
        yield every
        for axis in every:
            axis.set_visible(axis.has_data())
        picture.tight_layout()
        picture.savefig(FOLDER / f"{name}.png", bbox_inches="tight", metadata={"Software": None})
        plt.close(picture)


def legend_below(axis: Any, columns: int) -> None:
    """One legend for the whole picture, of what is in `axis`."""
    handles, labels = axis.get_legend_handles_labels()
    axis.figure.legend(handles, labels, loc="upper center", ncols=columns, bbox_to_anchor=(0.5, 0.0))


def bars(
    axis: Any, groups: Sequence[str], series: Sequence[tuple[str, str, Sequence[float]]], digits: int | None = 1
) -> None:
    """Bars side by side for each group; `series`: label, colour and a value for each group, written above its bar with so
    many digits, or not (None)."""
    width = 0.8 / len(series)
    for number, (label, color, values) in enumerate(series):
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        drawn = axis.bar(places, values, width * 0.94, label=label, color=color)
        if digits is not None:
            axis.bar_label(drawn, [f"{v:.{digits}f}" if v else "" for v in values], fontsize=7, padding=1)
    axis.set_xticks(range(len(groups)), groups)
    axis.margins(y=0.2)
    axis.grid(visible=False, axis="x")


def stacked(axis: Any, groups: Sequence[str], layers: Sequence[tuple[str, str, Sequence[float]]]) -> None:
    """Stacked bars; values of 3 and more are written into their piece."""
    bottoms = [0.0] * len(groups)
    for label, color, values in layers:
        drawn = axis.bar(groups, values, 0.66, bottom=bottoms, label=label, color=color)
        axis.bar_label(drawn, [f"{v:.1f}" if v >= 3 else "" for v in values], label_type="center", fontsize=7)
        bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
    axis.grid(visible=False, axis="x")


def latency_curves(axis: Any, curves: dict[str, list[Point]], labels: dict[str, str] | None = None) -> None:
    """Normalized latency against request rate, cut at 1 s/token as in the paper."""
    for name, points in curves.items():
        rates = [point.rate for point in points]
        values = [min(point.result.normalized_latency, 3.0) for point in points]
        label = (labels or LABELS)[name]
        axis.plot(rates, values, marker=MARKERS[name], color=COLORS[name], label=label, markersize=4, linewidth=1.4)
    axis.set_ylim(0, 1)
    axis.set_xlim(0, None)
    axis.set_xlabel("requests/s")
    axis.set_ylabel("normalized latency (s/token)")
