"""What a soak leaves in benchmarks/results and docs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from benchmarks import report
from tests.soak.client import Outcome
from tests.soak.run import Soak

GOAL_REQUESTS = 100_000
GOAL_MIB = 32.0
NUM_BINS = 60

Floats = npt.NDArray[np.float64]


def record(soak: Soak, commit: str, name: str) -> None:
    """Write benchmarks/results/NAME.json and docs/NAME.png."""
    assert soak.before is not None and soak.after is not None
    before, after = soak.before, soak.after
    total = sum(soak.outcomes.values())
    growth = max(after.memory - before.memory, 0.1)
    rows = [
        report.row("requests", total, "requests", "goal", GOAL_REQUESTS, higher_is_better=True),
        report.row("memory grew by", growth, "MiB", "goal", GOAL_MIB, higher_is_better=False),
        report.row(
            "memory grew in the second half by",
            max(growth_in_second_half([entry.memory for _, entry in soak.samples]), 0.1),
            "MiB",
            "goal",
            GOAL_MIB / 2,
            higher_is_better=False,
        ),
        *_same("threads of the model's process", before.num_model_threads, after.num_model_threads),
        *_same("file descriptors", before.num_files, after.num_files),
        *_same("shared memory", before.region_mib, after.region_mib, "MiB"),
    ]
    if before.device_mib:
        rows += _same("device memory", before.device_mib, after.device_mib, "MiB")
    rows += [
        report.row(
            f"goodput at twice that rate{name}", rates.goodput, "1/s", "full load", rates.peak, higher_is_better=True
        )
        for name, rates in soak.overloads.items()
    ]
    counts = ", ".join(f"{kind.name.lower()} {soak.outcomes[kind]}" for kind in Outcome)
    notes = (
        f"{soak.seconds:.0f} s; {counts}; {soak.num_canaries} canaries with the same text; blocks, rows and queue empty at the "
        f"end; faults: {len(soak.faults)}"
    )
    report.write(name, rows, notes, measured=report.source(commit))
    _draw(soak, name)


def growth_in_second_half(memory: list[float]) -> float:
    """The mean of the last tenth of the samples less that of the tenth in the middle."""
    tenth = max(len(memory) // 10, 1)
    middle = len(memory) // 2
    return float(np.mean(memory[-tenth:]) - np.mean(memory[middle : middle + tenth]))


def _same(name: str, before: float, after: float, unit: str = "") -> list[report.Row]:
    return [report.row(f"{name} at the end", after, unit, "before", before, higher_is_better=False)]


def _draw(soak: Soak, name: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picture, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True)
    edges = np.linspace(0, soak.seconds, NUM_BINS + 1)
    at = np.array([told.at for told in soak.told])
    for which, values in (("first", [told.first for told in soak.told]), ("last", [told.last for told in soak.told])):
        for percentile, style in ((50, "-"), (99, ":")):
            line = _percentiles(at, np.array(values), edges, percentile)
            above.plot(edges[:-1], line, style, label=f"{which} response, {percentile} %")
    above.set_yscale("log")
    above.set_ylabel("seconds")
    above.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    times = [seconds for seconds, _ in soak.samples]
    below.plot(times, [entry.memory for _, entry in soak.samples], label="memory of all processes (MiB)")
    below.plot(times, [entry.num_files for _, entry in soak.samples], label="file descriptors")
    below.plot(times, [entry.num_threads for _, entry in soak.samples], label="threads")
    below.set_ylim(0, None)
    below.set_xlabel("seconds")
    below.legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(report.ROOT / "docs" / f"{name}.png", dpi=110, metadata={"Software": None})


def _percentiles(at: Floats, values: Floats, edges: Floats, percentile: float) -> list[float]:
    """Of the values whose time lies between two edges; NaN where there are none."""
    found = []
    for low, high in pairwise(edges):
        inside = values[(at >= low) & (at < high)]
        found.append(float(np.percentile(inside, percentile)) if len(inside) else float("nan"))
    return found
