"""Output tokens per second through tritonserver on a GPU machine, beside the engine's own without a server, in one run.

Usage: python -m benchmarks.server.gpu_server --tokenizer FOLDER [--shapes llama8b,qwen06b] [--tritonserver FILE]
    [--perf-analyzer FILE] [--vllm-backend FOLDER --vllm FOLDER] [--name h100_server]

With the `src` folder of the official vllm_backend, and one with vLLM and what it needs, that is measured in its turn, too.

Random weights of a published shape with the vocabulary of the tokenizer in FOLDER (49,152 for SmolLM2's). perf_analyzer is
the client: gRPC streams in a closed loop, one prompt of about 110 tokens, 256 tokens out on average, prefix caching off. The
lengths differ, so that requests end and begin at any time, as they do in service, and not all in the same step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.peers import vllm_backend
from benchmarks.peers.gpu_worker import SHAPES, VLLM_SETTINGS
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
VLLM = {name: value for name, value in ENGINE.items() if name != "kv_cache_memory_bytes"} | {
    "gpu_memory_utilization": 0.5,  # our engine's memory is not given back; this is room for all requests at once, too
    "disable_log_stats": True,
}
READY_SECONDS = 240  # vLLM compiles for more than one minute


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


def rows_of(shape: str, streams: int, engine: Load, server: Load, official: Load | None) -> list[report.Row]:
    """Figures of one concurrency."""
    title = f"{TITLES[shape]}, {streams} streams"
    rows = []
    for peer, other in (("own engine, no server", engine), (vllm_backend.NAME, official)):
        if other is None:
            continue
        rate = (server.tokens_per_second, "tok/s", peer, other.tokens_per_second)
        first = (server.first_token_ms, "ms", peer, other.first_token_ms)
        rows.append(report.row(f"{title}, output", *rate, higher_is_better=True))
        rows.append(report.row(f"{title}, first token (median)", *first, higher_is_better=False))
    merged = (server.tokens_per_response, "tokens", "one token a response", 1.0)
    return [*rows, report.row(f"{title}, tokens a response (median)", *merged, higher_is_better=False)]


def serve(repository: Path, title: str, arguments: argparse.Namespace, folder: Path) -> dict[int, Load]:
    """A repository's model under every concurrency."""
    loads = {}
    installation = ensure_tritonserver(arguments.tritonserver)
    with TritonServer(
        repository, installation=installation, log_path=folder / f"{title}.log", ready_timeout=READY_SECONDS
    ) as server:
        for streams in STREAMS:
            url = server.grpc_url
            loads[streams] = server_load(
                arguments.perf_analyzer, url, "llm", PROMPT, streams, ROUNDS, OUTPUT_TOKENS, folder
            )
            print(f"{title}, {streams} streams: {loads[streams]}", flush=True)
    return loads


def measure(shape: str, arguments: argparse.Namespace, folder: Path) -> list[report.Row]:
    """All concurrencies of one model: the engine alone, then through the server, then the official backend."""
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
    served = serve(write_repository(folder, shape, model), shape, arguments, folder)
    official: dict[int, Load] = {}
    if arguments.vllm_backend is not None:
        os.environ.update(VLLM_SETTINGS)
        paths = (folder / f"official-{shape}", arguments.vllm_backend, arguments.vllm)
        repository = vllm_backend.write_repository(*paths, {"model": str(model), **VLLM})
        official = serve(repository, f"{shape}-{vllm_backend.NAME}", arguments, folder)
    return [
        row
        for streams in STREAMS
        for row in rows_of(shape, streams, alone[streams], served[streams], official.get(streams))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shapes", default="llama8b,qwen06b")
    parser.add_argument("--tritonserver", type=Path)
    parser.add_argument("--perf-analyzer", type=Path, default=Path("perf_analyzer"))
    parser.add_argument("--vllm-backend", type=Path, help="its `src` folder")
    parser.add_argument("--vllm", type=Path, help="folder with vLLM 0.26 and what it needs")
    parser.add_argument("--name", default="h100_server", help="of the result file")
    arguments = parser.parse_args()
    if (arguments.vllm_backend is None) != (arguments.vllm is None):
        parser.error("--vllm-backend and --vllm belong together")
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
