"""What the metrics cost: tokens per second and time to first token through tritonserver, with them and without.

The model is tiny, so that the engine and the senders, not the model, set the pace: the worst case for whatever shares
their process.

Usage: python benchmarks/server/metrics_cost.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import report
from benchmarks.server.cpu_server import make_prompts, server_rate
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.serve.triton_server import TritonServer

STREAMS = 32
ROUNDS = 12
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}


def make_model(folder: Path) -> Path:
    """A random one-layer model with the default model's tokenizer."""
    default = ensure_default_model()
    config = transformers.AutoConfig.from_pretrained(default)
    tiny = transformers.LlamaConfig(vocab_size=config.vocab_size, tie_word_embeddings=True, **SHAPE)
    transformers.LlamaForCausalLM(tiny).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(default).save_pretrained(folder)
    return folder


def write_repository(folder: Path, model: Path, disable_log_stats: bool) -> Path:
    """The shipped model repository with the tiny model."""
    shutil.copytree(report.ROOT / "model_repository", folder)
    arguments = {"model": str(model), "dtype": "float32", "enable_prefix_caching": False, "max_num_seqs": 64}
    (folder / "llm" / "1" / "model.json").write_text(json.dumps(arguments | {"disable_log_stats": disable_log_stats}))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rates: dict[bool, list[float]] = {True: [], False: []}  # by whether metrics are on
    first_tokens: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        with (
            TritonServer(write_repository(folder / "on", model, disable_log_stats=False)) as server_with,
            TritonServer(write_repository(folder / "off", model, disable_log_stats=True)) as server_without,
        ):
            prompts = make_prompts(STREAMS * ROUNDS)
            for repeat in range(options.repeats + 1):
                for shown, server in ((True, server_with), (False, server_without))[:: 1 if repeat % 2 else -1]:
                    rate, first_token = server_rate(server, prompts, STREAMS, folder)
                    if repeat > 0:  # the first round warms both up
                        rates[shown].append(rate)
                        first_tokens[shown].append(first_token)
    rows = [
        report.row(
            f"{STREAMS} streams, {what}",
            statistics.median(values[True]) * scale,
            unit,
            "without metrics",
            statistics.median(values[False]) * scale,
            higher_is_better=higher_is_better,
        )
        for what, unit, values, scale, higher_is_better in (
            ("output", "tok/s", rates, 1.0, True),
            ("time to first token", "ms", first_tokens, 1e3, False),
        )
    ]
    notes = f"random one-layer model, 128 tokens in, 64 out, closed loop, medians of {options.repeats} alternating runs"
    report.write("metrics_cost", rows, notes)


if __name__ == "__main__":
    main()
