"""Part `steps`: how long the engine's steps take on the device, for the simulation of what is too long to run there."""

from __future__ import annotations

import statistics
import time

from benchmarks.paper.gpu.record import Record, Recorder, TimeBox
from benchmarks.paper.gpu.serving import EngineSetup, Server
from benchmarks.paper.measured_time import MeasuredStep, MeasuredStepTime
from pagedcore.engine.engine import Engine
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams

# (rows, tokens in the context of each) of steps that decode, and lengths of prompts that are computed at once.
DECODES = ((1, 64), (8, 64), (32, 64), (64, 64), (128, 64), (256, 48), (8, 1000), (32, 400), (64, 200), (1, 1900))
PROMPTS = (16, 64, 128, 256, 512, 1024, 1900)
NUM_STEPS = 24


def measure(server: Server, recorder: Recorder, box: TimeBox) -> None:
    """All steps that have not been measured yet."""
    engine = server.engine(EngineSetup("paged"))
    for length in PROMPTS:
        key = "prompt", str(length)
        if recorder.record.find(*key) is None and length < server.num_slots and box.has(2.0):
            times = [_prompt_seconds(engine, length) for _ in range(6)][1:]
            recorder.add(*key, tokens=length, context=length, seconds=statistics.median(times))
    for rows, context in DECODES:
        key = "decode", f"{rows} x {context}"
        fits = rows * (context + NUM_STEPS + 16) < server.num_slots
        if recorder.record.find(*key) is None and fits and box.has(5.0):
            seconds = _decode_seconds(engine, rows, context)
            recorder.add(*key, tokens=rows, context=rows * (context + NUM_STEPS / 2), seconds=seconds)


def step_time_of(record: Record) -> MeasuredStepTime:
    """The model of time that these measurements give."""
    return MeasuredStepTime(
        [
            MeasuredStep(round(point.values["tokens"]), round(point.values["context"]), point.values["seconds"])
            for point in record.points
        ]
    )


def _request(name: str, length: int, max_tokens: int) -> Request:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return Request(name, [3 + at % 400 for at in range(length)], params)


def _prompt_seconds(engine: Engine, length: int) -> float:
    engine.add_request(_request("prompt", length, 1))
    begin = time.perf_counter()
    _run_out(engine)
    return time.perf_counter() - begin


def _decode_seconds(engine: Engine, rows: int, context: int) -> float:
    """The mean over NUM_STEPS steps in which all rows decode, one step ahead as in service."""
    for row in range(rows):
        engine.add_request(_request(f"row{row}", context, NUM_STEPS + 12))
    num_drawn: dict[str, int] = {}
    while len(num_drawn) < rows or min(num_drawn.values()) < 4:
        for output in engine.step():
            num_drawn[output.request_id] = num_drawn.get(output.request_id, 0) + len(output.token_ids)
    begin = time.perf_counter()
    last = f"row{rows - 1}"
    wanted = num_drawn[last] + min(NUM_STEPS, NUM_STEPS + 12 - max(num_drawn.values()) - 2)
    num_steps = wanted - num_drawn[last]
    while num_drawn[last] < wanted:
        for output in engine.step():
            num_drawn[output.request_id] += len(output.token_ids)
    seconds = (time.perf_counter() - begin) / num_steps
    _run_out(engine)
    return seconds


def _run_out(engine: Engine) -> None:
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise output.error
