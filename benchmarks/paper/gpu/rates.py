"""Parts `fig12`, `fig14`, `fig16`, `fig17`, `fig18b` and `fig19b`: rates that systems sustain, and latencies at rates around those.

What a system sustains is its output in saturation: requests arrive faster than it serves them, so that it is never short
of them. Latencies at rates below and above come after, as far as there is time.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from benchmarks.paper.gpu.panels import PANELS, PAPER_SLOTS, Panel
from benchmarks.paper.gpu.record import Record, Recorder, TimeBox
from benchmarks.paper.gpu.serving import EngineSetup, Live, LiveRun, Server
from benchmarks.paper.workloads import ALPACA, SHAREGPT, LogNormalLengths, PlainTrace
from pagedcore.engine.swap_space import PreemptionMode

SHARES = (0.9, 0.5, 0.75, 1.1)  # of what a system sustains: rates at which latency is measured, the most telling first
FIGURE_18B_SIZES = (16, 32, 64, 128, 256)
FIGURE_19B_SIZES = (16, 64, 256)
OVERHEAD = 2.0  # seconds between runs
_BEYOND_ANY = 30_000.0  # output tokens/s that a 13B model on one GPU does not reach


def panels_of(part: str, recorder: Recorder, server: Server, box: TimeBox, scale: float) -> None:
    """Saturation of every system of every panel, then latencies."""
    panels = [replace(panel, seconds=scale * panel.seconds) for panel in PANELS[part]()]
    for panel in panels:
        for system in panel.systems:
            saturate(recorder, server, panel, system, box)
    for share in SHARES:
        for panel in panels:
            for system in panel.systems:
                _latency(recorder, server, panel, system, share, box)


def saturate(recorder: Recorder, server: Server, panel: Panel, system: EngineSetup, box: TimeBox, *key: str) -> None:
    """Measure what a system sustains, in requests/s, unless that is known; `key`: further names of the point."""
    name = "saturation", panel.name, system.policy, *key
    if recorder.record.find(*name) is not None or not box.has(1.25 * panel.seconds + OVERHEAD):
        return
    rate = _too_high(recorder.record, panel)
    live = _run(server, panel, system, rate)
    if not _known(recorder.record, panel) and box.has(1.25 * panel.seconds + OVERHEAD):
        # At the rate of the systems after it: another rate is another trace.
        rate = 3 * live.output_tokens_per_second / panel.mean_output
        live = _run(server, panel, system, rate)
    while live.num_unfinished < live.num_requests / 5 and box.has(1.25 * panel.seconds + OVERHEAD):  # it kept up
        rate *= 4
        live = _run(server, panel, system, rate)
    recorder.add(*name, sustained=live.output_tokens_per_second / panel.mean_output, rate=rate, **_values(live, panel))


def _latency(recorder: Recorder, server: Server, panel: Panel, system: EngineSetup, share: float, box: TimeBox) -> None:
    saturation = recorder.record.find("saturation", panel.name, system.policy)
    name = "latency", panel.name, system.policy, f"{share:g}"
    if saturation is None or recorder.record.find(*name) is not None or not box.has(1.25 * panel.seconds + OVERHEAD):
        return
    rate = share * saturation.values["sustained"]
    if rate > 0:
        live = _run(server, panel, system, rate)
        recorder.add(*name, rate=rate, **_values(live, panel))


def _too_high(record: Record, panel: Panel) -> float:
    """A rate beyond what any system sustains: more than the best one so far did, or, before that, than any GPU does."""
    known = _known(record, panel)
    return 3 * max(known) if known and max(known) > 0 else _BEYOND_ANY / panel.mean_output


def _known(record: Record, panel: Panel) -> list[float]:
    """What systems sustain of this panel, as far as it has been measured."""
    return [point.values["sustained"] for point in record.points if point.key[:2] == ("saturation", panel.name)]


def _run(server: Server, panel: Panel, system: EngineSetup, rate: float) -> Live:
    return LiveRun(server, system, panel.trace.build(rate, panel.seconds), panel.seconds).run()


def _values(live: Live, panel: Panel) -> dict[str, float]:
    return {"seconds": panel.seconds, **{name: float(value) for name, value in asdict(live).items()}}


def _size_panel(lengths: LogNormalLengths, seconds: float) -> Panel:
    return Panel(lengths.name, PlainTrace(lengths), lengths.output_mean, seconds, (EngineSetup("paged", PAPER_SLOTS),))


def block_sizes(recorder: Recorder, shape: str, device: str, box: TimeBox, scale: float) -> None:
    """Figure 18b: what the engine sustains at each block size that the attention kernel of the device supports."""
    panels = [_size_panel(SHAREGPT, 30.0 * scale), _size_panel(ALPACA, 14.0 * scale)]
    for size in FIGURE_18B_SIZES if device == "cuda" else (1, 4, 16, 64, 256):
        keys = [("saturation", panel.name, "paged", f"blocks of {size}") for panel in panels]
        if all(recorder.record.find(*key) is not None for key in keys) or not box.has(30.0 * scale + 15.0):
            continue
        server = Server(shape, device, block_size=size, num_slots=PAPER_SLOTS)
        try:
            for panel in panels:
                saturate(recorder, server, panel, panel.systems[0], box, f"blocks of {size}")
        finally:
            server.shutdown()


def preemption(recorder: Recorder, shape: str, device: str, box: TimeBox, scale: float, swap_space: float) -> None:
    """Figure 19b: swapping and recomputing in saturation, where requests are preempted all the time, by block size."""
    panel = _size_panel(SHAREGPT, 30.0 * scale)
    for size in FIGURE_19B_SIZES:
        modes = [PreemptionMode.RECOMPUTE, PreemptionMode.SWAP]
        keys = [("saturation", panel.name, "paged", f"blocks of {size}", mode.value) for mode in modes]
        if all(recorder.record.find(*key) is not None for key in keys) or not box.has(40.0 * scale + 15.0):
            continue
        server = Server(shape, device, block_size=size, num_slots=PAPER_SLOTS, swap_space=swap_space)
        try:
            for mode in modes:
                system = replace(panel.systems[0], preemption_mode=mode)
                saturate(recorder, server, panel, system, box, f"blocks of {size}", mode.value)
        finally:
            server.shutdown()
