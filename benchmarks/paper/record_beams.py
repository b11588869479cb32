"""Record how the beams of a real model descend from each other, for figures 14 and 15: benchmarks/data/beam_parents.json.gz.

The engine itself searches: SmolLM2 on the CPU, all prompts of a width at once.

Usage: python benchmarks/paper/record_beams.py      (minutes; fetches the default model)
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.paper.workloads import DATA
from benchmarks.report import ROOT
from pagedcore.build import load_engine
from pagedcore.config import EngineConfig
from pagedcore.engine.engine import Engine
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.serve.default_model import ensure_default_model

NUM_PROMPTS, NUM_STEPS, WIDTHS = 12, 320, (2, 4, 6)
OUT = DATA / "beam_parents.json.gz"


def record(engine: Engine, prompts: list[list[int]], width: int) -> list[list[int]]:
    """Search without an end: for each prompt, the parents of its `width` beams at every step, flattened."""
    params = SamplingParams(temperature=0, beam_width=width, max_tokens=NUM_STEPS + 2, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(Request(str(number), prompt, params))
    beams: dict[str, list[list[int]]] = {}
    parents: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while engine.has_work():
        engine.step()
        for group in engine.scheduler.running:
            now = [list(seq.token_ids) for seq in group.sequences]
            before = beams.get(group.request_id, now)
            if len(before) == len(now) == width and len(before[0]) < len(now[0]):
                # No two beams are equal, so a beam's tokens before the last one tell which beam it went on from.
                parents[group.request_id] += [before.index(tokens[:-1]) for tokens in now]
            beams[group.request_id] = now
    return list(parents.values())


def main() -> None:
    config = EngineConfig(
        model=str(ensure_default_model()),
        max_model_len=1024,
        max_num_seqs=NUM_PROMPTS * max(WIDTHS),
        num_gpu_blocks_override=NUM_PROMPTS * max(WIDTHS) * 40,
    )
    loaded = load_engine(config)
    assert loaded.tokenizer is not None
    lines = (ROOT / "tests" / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [
        loaded.tokenizer.encode(
            loaded.tokenizer.apply_chat_template([{"role": "user", "content": json.loads(line)}]), False
        )
        for line in lines[:NUM_PROMPTS]
    ]
    record_of = {}
    for width in WIDTHS:
        record_of[str(width)] = record(loaded.engine, prompts, width)
        print(f"beam width {width}: {NUM_PROMPTS} prompts, {NUM_STEPS} steps")
    loaded.shutdown()
    with OUT.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
        stream.write(json.dumps(record_of, separators=(",", ":")).encode())


if __name__ == "__main__":
    main()
