"""Output tokens per second through tritonserver on a GPU machine, beside the engine's own without a server, in one run.

Usage: python -m benchmarks.server.gpu_server --tokenizer FOLDER [--shapes llama8b,qwen06b] [--tritonserver FILE]
    [--perf-analyzer FILE] [--name h100_server]

Random weights of a published shape with the vocabulary of the tokenizer in FOLDER (49,152 for SmolLM2's). perf_analyzer is
the client: gRPC streams in a closed loop, one prompt of about 110 tokens, 256 tokens out on average, prefix caching off. The
lengths differ, so that requests end and begin at any time, as they do in service, and not all in the same step.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.peers.gpu_worker import SHAPES
from benchmarks.server.closed_loop import Load, engine_load, server_load
from pagedcore.build import build_engine
from pagedcore.config import EngineConfig
from pagedcore.serve.triton_install import ensure_tritonserver
from pagedcore.serve.triton_server import TritonServer

STREAMS = (1, 32, 128, 256)
ROUNDS = 3  # requests of a stream
OUTPUT_TOKENS = random.Random(0).sample(range(130, 384, 4), 64)  # all of these, in some order: 256 on average
PROMPT = " ".join(["The quick brown fox jumps over the lazy dog near the river bank."] * 9)
TITLES = {"llama8b": "Llama-3.1-8B shape", "qwen06b": "Qwen3-0.6B shape"}
# Both engines, in this process and in the server, are on the GPU at once.
ENGINE = {
    "load_format": "dummy",
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "max_num_seqs": 256,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 15 << 30,
}


def write_model(folder: Path, shape: str, tokenizer: Path) -> Path:
    """A model folder of this shape with that tokenizer and no weights."""
    model = folder / f"model-{shape}"
    model.mkdir()
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, model / file.name)
    vocab_size = len(json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    config = {**SHAPES[shape], "vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def write_repository(folder: Path, shape: str, model: Path) -> Path:
    """The shipped model.py and config.pbtxt with this benchmark's engine arguments."""
    target = folder / f"repository-{shape}" / "llm"
    (target / "1").mkdir(parents=True)
    shipped = report.ROOT / "model_repository" / "llm"
    shutil.copy(shipped / "config.pbtxt", target / "config.pbtxt")
    shutil.copy(shipped / "1" / "model.py", target / "1" / "model.py")
    (target / "1" / "model.json").write_text(json.dumps({"model": str(model), **ENGINE}), encoding="utf-8")
    return target.parent


def rows_of(shape: str, streams: int, engine: Load, server: Load) -> list[report.Row]:
    """Figures of one concurrency."""
    title, peer = f"{TITLES[shape]}, {streams} streams", "own engine, no server"
    rate = (server.tokens_per_second, "tok/s", peer, engine.tokens_per_second)
    first = (server.first_token_ms, "ms", peer, engine.first_token_ms)
    merged = (server.tokens_per_response, "tokens", "one token a response", 1.0)
    return [
        report.row(f"{title}, output", *rate, higher_is_better=True),
        report.row(f"{title}, first token (median)", *first, higher_is_better=False),
        report.row(f"{title}, tokens a response (median)", *merged, higher_is_better=False),
    ]


def measure(shape: str, arguments: argparse.Namespace, folder: Path) -> list[report.Row]:
    """All concurrencies of one model: the engine alone, then through the server."""
    model = write_model(folder, shape, arguments.tokenizer)
    loaded = build_engine(EngineConfig.from_dict({"model": str(model), **ENGINE}))
    assert loaded.tokenizer is not None
    prompt = loaded.tokenizer.encode(PROMPT)
    engine_load(loaded.engine, prompt, 32, 1, [32])
    alone = {}
    for streams in STREAMS:
        alone[streams] = engine_load(loaded.engine, prompt, streams, ROUNDS, OUTPUT_TOKENS)
        print(f"{shape}, {streams} streams, engine: {alone[streams]}", flush=True)
    loaded.shutdown()
    rows = []
    installation = ensure_tritonserver(arguments.tritonserver)
    log = folder / f"{shape}.log"
    with TritonServer(
        write_repository(folder, shape, model), installation=installation, log_path=log, ready_timeout=120
    ) as server:
        for streams in STREAMS:
            served = server_load(
                arguments.perf_analyzer, server.grpc_url, "llm", PROMPT, streams, ROUNDS, OUTPUT_TOKENS, folder
            )
            print(f"{shape}, {streams} streams, server: {served}", flush=True)
            rows += rows_of(shape, streams, alone[streams], served)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shapes", default="llama8b,qwen06b")
    parser.add_argument("--tritonserver", type=Path)
    parser.add_argument("--perf-analyzer", type=Path, default=Path("perf_analyzer"))
    parser.add_argument("--name", default="h100_server", help="of the result file")
    arguments = parser.parse_args()
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory() as name:
        for shape in arguments.shapes.split(","):
            rows += measure(shape, arguments, Path(name))
            notes = (
                f"random weights, bfloat16, about 110 tokens in, {min(OUTPUT_TOKENS)}-{max(OUTPUT_TOKENS)} out, greedy; "
                "gRPC streams in a closed loop, perf_analyzer and server on the same machine"
            )
            report.write(arguments.name, rows, notes)


if __name__ == "__main__":
    main()
