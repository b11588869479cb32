"""The parts that need a GPU, run on the CPU with a tiny model: what they measure, resume and draw."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.paper import gpu_figures, page, plots
from benchmarks.paper.gpu import __main__ as script
from benchmarks.paper.gpu.panels import PANELS
from benchmarks.paper.gpu.record import Record
from benchmarks.paper.gpu.serving import EngineSetup, LiveRun, Server
from benchmarks.paper.gpu.step_times import step_time_of
from benchmarks.paper.measured_time import MeasuredStep, MeasuredStepTime
from benchmarks.paper.workloads import ALPACA, BeamTrace, PlainTrace, TraceRequest
from pagedcore.config import KV_POLICIES


def call(folder: Path, monkeypatch: pytest.MonkeyPatch, *parts: str, minutes: float = 2.0) -> dict[str, Record]:
    """Run the script as from the command line."""
    arguments = ["gpu", "--device", "cpu", "--shape", "tiny", "--commit", "0123", "--scale", "0.004"]
    arguments += ["--out", str(folder), "--minutes", str(minutes)]
    for part in parts:
        arguments += ["--part", part]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    return gpu_figures.records(folder)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    loaded = Server("tiny", "cpu", num_slots=15_700)
    yield loaded
    loaded.shutdown()


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_a_trace_is_served_to_its_end_under_every_policy(server: Server, policy: str) -> None:
    """Every request gets as many tokens as it has in the trace, samples and beams too."""
    plain, samples, beams = (
        source.build(100.0, 0.3) for source in (PlainTrace(ALPACA), PlainTrace(ALPACA, 3), BeamTrace(ALPACA, 4))
    )
    for trace in (plain, samples, beams):
        run = LiveRun(server, EngineSetup(policy, 15_700), trace, seconds=60.0)
        live = run.run()
        assert (live.num_requests, live.num_unfinished) == (len(trace), 0)
        assert 0 < live.normalized_latency < 60
        lengths = run.num_tokens
        if policy == "paged" and trace is beams:
            assert not lengths, "beams are told at their end"
            continue
        for number, request in enumerate(trace):
            of_request = [count for (name, _), count in lengths.items() if name.split(".")[0] == str(number)]
            assert of_request == [request.output_len] * request.num_samples


def test_requests_that_did_not_end_in_time_count_with_the_time_so_far(server: Server) -> None:
    trace = [TraceRequest(0.0, [5] * 8, 2000)] * 40
    live = LiveRun(server, EngineSetup("paged", 15_700), trace, seconds=0.2).run()
    assert live.num_unfinished == 40
    assert 0.25 / 2000 <= live.normalized_latency < 2.0 / 2000
    assert not server.engine(EngineSetup("paged")).has_work()


def test_parts_are_measured_resumed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "points"
    first = call(folder, monkeypatch, "steps", "fig16")
    steps = {point.key: point.values for point in first["steps"].points}
    assert steps["decode", "64 x 64"]["tokens"] == 64
    assert all(values["seconds"] > 0 for values in steps.values())
    sustained = [point for point in first["fig16"].points if point.key[0] == "saturation"]
    assert [(point.key[1], point.key[2]) for point in sustained] == [
        (panel.name, system.policy) for panel in PANELS["fig16"]() for system in panel.systems
    ]
    again = call(folder, monkeypatch, "steps", "fig16")
    assert [record.points for record in again.values()] == [record.points for record in first.values()]
    del first["fig16"].points[1:]
    (folder / "fig16.json").write_text(json.dumps(_values_of(first["fig16"])), encoding="utf-8")
    assert call(folder, monkeypatch, "fig16", minutes=0.0)["fig16"].points == first["fig16"].points, "no time left"
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "pictures")
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path)
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    gpu_figures.write(again, [])
    rows = json.loads((tmp_path / "paper_gpu.json").read_text(encoding="utf-8"))
    assert rows["commit"] == "0123" and "--part steps" in rows["command"]
    assert {row["peer"] for row in rows["rows"]} == {"Orca (Oracle) policy"}
    (tmp_path / "paper.json").write_text(json.dumps(rows), encoding="utf-8")
    text = page.rewritten("<!-- rows: gpu fig 16 -->\nold\n<!-- end -->\n<!-- rows: gpu fig 12 -->\n<!-- end -->")
    assert "![fig 16](paper/gpu_fig16.png)" in text and "prefix of 341 tokens" in text and "Not measured yet." in text
    assert (tmp_path / "pictures" / "gpu_fig16.png").exists()
    assert step_time_of(again["steps"]).seconds(64, 4000) > 0


def test_a_part_that_fails_is_told_and_the_others_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "steps.json").write_text("no JSON", encoding="utf-8")
    with pytest.raises(SystemExit, match="failed: steps"):
        call(tmp_path, monkeypatch, "steps", "fig18a", minutes=0.5)
    (tmp_path / "steps.json").unlink()
    assert len(gpu_figures.records(tmp_path)["fig18a"].points) == 8 + 9


def _values_of(record: Record) -> dict[str, object]:
    points = [{"key": point.key, "values": point.values} for point in record.points]
    return {"part": record.part, "shape": record.shape, "source": vars(record.source), "points": points}


def test_kernels_and_moves_are_measured_on_any_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = call(tmp_path, monkeypatch, "fig18a", "fig19", minutes=0.4)
    assert len(measured["fig18a"].points) == 8 + 9 and len(measured["fig19"].points) >= 9
    monkeypatch.setattr(plots, "FOLDER", tmp_path)
    assert len(gpu_figures.attention(measured["fig18a"])) == 2 * 8 + 9
    assert len(gpu_figures.preemption(measured["fig19"])) >= 9


def test_measured_steps_are_met_and_others_lie_between_and_beyond_them() -> None:
    def truth(tokens: int, context: int) -> float:
        return 0.01 + 2e-4 * tokens + 3e-7 * context

    steps = [MeasuredStep(n, c, truth(n, c)) for n in (1, 8, 512, 1024) for c in (n, 5_000 + n)]
    time = MeasuredStepTime(steps)
    assert time.per_context_token == pytest.approx(3e-7)
    for tokens, context in ((1, 1), (8, 5_008), (200, 900), (2_000, 2_000)):
        assert time.seconds(tokens, context) == pytest.approx(truth(tokens, context))
