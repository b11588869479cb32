"""Figure 15: how much memory samples and beams of one request save by sharing blocks, while the engine serves them."""

from __future__ import annotations

from benchmarks import report
from benchmarks.paper import plots
from benchmarks.paper.memory import opt_13b
from benchmarks.paper.runs import Point, Sweep
from benchmarks.paper.shapes import paper_row
from benchmarks.paper.workloads import ALPACA, SHAREGPT, BeamTrace, PlainTrace

# Figure 15, in percent: Alpaca at widths 2, 4 and 6. Of ShareGPT the paper gives the range.
WIDTHS = (2, 4, 6)
PAPER = {
    ("Alpaca", "parallel sampling"): (6.09, 8.53, 9.79),
    ("Alpaca", "beam search"): (37.56, 53.13, 55.16),
    ("ShareGPT", "parallel sampling"): (16.2, None, 30.5),
    ("ShareGPT", "beam search"): (44.3, None, 66.3),
}
# Requests/s at width 1, below what the engine sustains, and seconds of the traces.
LOADS = {"Alpaca": (ALPACA, 24.0, 150.0), "ShareGPT": (SHAREGPT, 1.5, 800.0)}


def sweeps() -> dict[tuple[str, ...], Sweep]:
    """All runs of this file: ("sharing", data set, method, width)."""
    found: dict[tuple[str, ...], Sweep] = {}
    for name, method in PAPER:
        lengths, rate, seconds = LOADS[name]
        for width in WIDTHS:
            trace = PlainTrace(lengths, width) if method == "parallel sampling" else BeamTrace(lengths, width)
            found["sharing", name, method, str(width)] = Sweep(opt_13b("paged"), trace, (rate / width,), seconds)
    return found


def figure_15(points: dict[tuple[str, ...], list[Point]]) -> list[report.Row]:
    """Memory saved by sharing, for samples and for beams."""
    rows = []
    with plots.figure("fig15", columns=2, rows=2, size=(3.9, 2.6)) as axes:
        for axis, ((name, method), paper) in zip(axes, PAPER.items(), strict=True):
            savings = [points["sharing", name, method, str(width)][0].result.sharing for width in WIDTHS]
            series = [("this engine", plots.COLORS["paged"], [saving.percent for saving in savings])]
            series.append(("paper", plots.PAPER_COLOR, [value or 0.0 for value in paper]))
            plots.bars(axis, [str(width) for width in WIDTHS], series)
            axis.set_title(f"{name}, {method}")
            axis.set_xlabel("samples" if method == "parallel sampling" else "beam width")
            axis.set_ylabel("memory saved (%)")
            axis.legend(loc="upper left")
            for width, saving, value in zip(WIDTHS, savings, paper, strict=True):
                if value is not None:
                    rows.append(paper_row(f"fig 15: {name}, {method}, {width}", saving.percent, "%", value))
            if method == "beam search":
                copies = savings[-1].num_copies / savings[-1].num_rows
                name = f"fig 15: {name}, blocks copied a beam and step, {WIDTHS[-1]} beams"
                rows.append(report.row(name, copies, "blocks", "at most", 1.0, higher_is_better=False))
    return rows
