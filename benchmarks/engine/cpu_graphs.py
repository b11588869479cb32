"""A decode step of the default model with captured kernel calls, beside the same step called from Python.

Usage: python benchmarks/engine/cpu_graphs.py
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from pagedcore.build import load_engine
from pagedcore.config import EngineConfig
from pagedcore.engine.engine import Engine
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.serve.default_model import ensure_default_model

CONTEXT, STEPS, ROUNDS = 128, 64, 5


def load(folder: Path, enforce_eager: bool) -> Engine:
    config = EngineConfig(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=512,
        num_gpu_blocks_override=1024,
        enable_prefix_caching=False,
        enforce_eager=enforce_eager,
    )
    return load_engine(config).engine


def decode(engine: Engine, batch: int) -> list[float]:
    """Milliseconds of each decode step of `batch` sequences, from the end of their prompts on."""
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
    for number in range(batch):
        engine.add_request(Request(str(number), [number + 5] * CONTEXT, params))
    while len(engine.step()) < batch:
        pass
    times = []
    while engine.has_work():
        begin = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - begin) * 1e3)
    return times[2:-2]  # without the steps in which the pipeline fills and empties


def main() -> None:
    folder = ensure_default_model()
    engines = {"graphs": load(folder, False), "eager": load(folder, True)}
    rows = []
    for batch in (1, 8, 32):
        times: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(ROUNDS):
            for name, engine in engines.items():
                times[name].append(statistics.median(decode(engine, batch)))
        graphs, eager = (statistics.median(times[name]) for name in ("graphs", "eager"))
        rows.append(
            report.row(f"decode step, batch {batch}", graphs, "ms", "enforce_eager", eager, higher_is_better=False)
        )
    report.write("cpu_graphs", rows, f"SmolLM2-135M-Instruct, context {CONTEXT}, both engines in turn in one process")
    for engine in engines.values():
        engine.shutdown()


if __name__ == "__main__":
    main()
