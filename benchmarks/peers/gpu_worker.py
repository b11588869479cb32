"""Measures an engine with vLLM's offline interface on a GPU, in a process of its own: figures go to standard output as JSON.

Usage: python -m benchmarks.peers.gpu_worker {pagedcore,vllm} {llama8b,qwen06b} [--quick] [--steps] [--batch-invariant]

Random weights of a published shape, token ids in, token ids out, prefix caching off, at most 256 sequences of 4096 tokens.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "attention_bias": False,
}
SHAPES: dict[str, dict[str, Any]] = {"llama8b": LLAMA_8B, "qwen06b": QWEN3_06B}
BATCHES = (1, 8, 32, 128, 256)
PROMPT_LENGTHS = (512, 2048)
DECODED = 256  # tokens over which a decode step is averaged
DECODED_IN_STEPS = 96  # the same, where only steps are measured
LONG_BATCH, LONG_CONTEXT = 4, 3600

VLLM_SETTINGS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Engine:
    """An engine under measurement."""

    def __init__(self, name: str, shape: str, **arguments: Any) -> None:
        """arguments: of the engine, beside those that all are measured with."""
        os.environ.update(VLLM_SETTINGS, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
        start = time.perf_counter()
        module = importlib.import_module(name)
        self._params = module.SamplingParams
        self._llm = module.LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=4096,
            gpu_memory_utilization=0.9,
            enable_prefix_caching=False,
            seed=0,
            max_num_seqs=256,
            disable_log_stats=True,
            **arguments,
        )
        self.start_seconds = time.perf_counter() - start

    def run(self, input_lens: list[int], output_lens: list[int], temperature: float = 0.0) -> float:
        """Seconds to generate these numbers of tokens from random prompts of these lengths."""
        rng = random.Random(0)
        prompts = [{"prompt_token_ids": [rng.randrange(100_000) for _ in range(n)]} for n in input_lens]
        params = [
            self._params(temperature=temperature, ignore_eos=True, max_tokens=n, detokenize=False) for n in output_lens
        ]
        start = time.perf_counter()
        self._llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start


def decode_step(engine: Engine, batch: int, prompt: int, decoded: int) -> float:
    """Milliseconds, averaged over the tokens decoded behind the first 16 of prompts of a length."""
    short = engine.run([prompt] * batch, [16] * batch)
    long = engine.run([prompt] * batch, [16 + decoded] * batch)
    return (long - short) / decoded * 1e3


def measure_steps(engine: Engine, decoded: int) -> dict[str, float]:
    """Milliseconds of decode steps and of first tokens, by name."""
    engine.run([64] * 8, [16] * 8)
    figures = {f"decode step, batch {batch}": decode_step(engine, batch, 128, decoded) for batch in BATCHES}
    for length in PROMPT_LENGTHS:
        figures[f"first token of {length}"] = min(engine.run([length], [1]) for _ in range(3)) * 1e3
    return figures


def measure(engine: Engine, quick: bool) -> dict[str, float]:
    """Figures by name; times in milliseconds, throughputs in output tokens per second."""
    figures = {"start-up, s": engine.start_seconds} | measure_steps(engine, DECODED)
    rng = random.Random(0)
    input_lens = [rng.randint(100, 1024) for _ in range(256)]
    output_lens = [rng.randint(100, 1024) for _ in range(256)]
    for temperature in (0.0,) if quick else (0.0, 0.6):
        seconds = engine.run(input_lens, output_lens, temperature)
        figures[f"256 requests, T={temperature:g}"] = sum(output_lens) / seconds
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=("pagedcore", "vllm"))
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--quick", action="store_true", help="greedy only")
    parser.add_argument(
        "--steps", action="store_true", help="steps and first tokens only, of fewer tokens, and of a long context"
    )
    parser.add_argument("--batch-invariant", action="store_true", help="pagedcore's mode of that name")
    arguments = parser.parse_args()
    engine = Engine(
        arguments.engine, arguments.shape, **({"batch_invariant": True} if arguments.batch_invariant else {})
    )
    if arguments.steps:
        figures = measure_steps(engine, DECODED_IN_STEPS)
        long = decode_step(engine, LONG_BATCH, LONG_CONTEXT, DECODED_IN_STEPS)
        figures[f"decode step, batch {LONG_BATCH}, context of {LONG_CONTEXT}"] = long
    else:
        figures = measure(engine, arguments.quick)
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
