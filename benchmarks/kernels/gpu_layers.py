"""Time the CUDA kernels around attention and the sampler, beside torch's ways to the same result.

Usage: python -m benchmarks.kernels.gpu_layers [--name NAME]
Sizes are Llama-3.1-8B's, bf16. Inputs stay in the L2 cache where they fit, as they do between the kernels of a layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional

from benchmarks import report
from benchmarks.kernels.gpu_timing import Launch, microseconds
from pagedcore import ops

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB, BLOCK_SIZE = 4096, 14336, 32, 8, 128, 128256, 16
Pair = tuple[str, Launch, Launch]


def rms_norm(num_tokens: int) -> Pair:
    x, residual = (torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(x)
    x *= 0.01

    def peer() -> None:
        functional.rms_norm(residual.add_(x), (HIDDEN,), weight, 1e-5)

    return "residual + rms_norm", lambda: ops.rms_norm(x, weight, 1e-5, residual, out), peer


def silu_and_mul(num_tokens: int) -> Pair:
    x = torch.randn(num_tokens, 2 * INTERMEDIATE, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(num_tokens, INTERMEDIATE, dtype=torch.bfloat16, device="cuda")
    return (
        "silu_and_mul",
        lambda: ops.silu_and_mul(x, out),
        lambda: torch.mul(functional.silu(x[:, :INTERMEDIATE]), x[:, INTERMEDIATE:], out=out),
    )


def rotary_write_kv(num_tokens: int) -> Pair:
    qkv = torch.randn(num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    angles = torch.rand(8192, HEAD_DIM // 2, device="cuda")
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    positions = torch.randint(0, 8192, (num_tokens,), dtype=torch.int32, device="cuda")
    num_blocks = num_tokens // BLOCK_SIZE + 1
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:num_tokens].int()
    cache = torch.zeros(2, num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    arguments = (qkv, cos_sin, positions, slots, cache[0], cache[1], HEADS, KV_HEADS, HEAD_DIM)
    where, block, offset = positions.long(), slots.long() // BLOCK_SIZE, slots.long() % BLOCK_SIZE

    def peer() -> None:
        heads = qkv.view(num_tokens, -1, HEAD_DIM)
        rotated = heads[:, : HEADS + KV_HEADS]
        cos, sin = cos_sin[where].bfloat16()[:, None].chunk(2, -1)
        first, second = rotated.chunk(2, -1)
        rotated.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))
        cache[0][block, :, offset] = heads[:, HEADS : HEADS + KV_HEADS]
        cache[1][block, :, offset] = heads[:, HEADS + KV_HEADS :]

    return "rotary_write_kv", lambda: ops.rotary_write_kv(*arguments), peer


def sampling(num_rows: int, temperature: float, top_k: int, top_p: float) -> Pair:
    logits = torch.randn(num_rows, VOCAB, device="cuda") * 3
    parameters = np.zeros((num_rows, 8), np.int32)
    parameters[:, 1] = top_k
    parameters.view(np.float32)[:, [0, 2]] = temperature, top_p
    on_gpu = torch.from_numpy(parameters).cuda()

    def peer() -> None:
        if temperature == 0:
            logits.argmax(-1)
            return
        scaled = logits / temperature
        if top_k or top_p < 1:
            ordered, ids = scaled.sort(-1, descending=True)
            ordered[:, top_k:] = float("-inf")
            probabilities = ordered.softmax(-1)
            probabilities[probabilities.cumsum(-1) - probabilities > top_p] = 0
            ids.gather(1, (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True))
        else:
            (scaled.softmax(-1) / torch.empty_like(scaled).exponential_()).argmax(-1)

    name = "greedy" if temperature == 0 else f"T {temperature}" + (f" top-k {top_k} top-p {top_p}" if top_k else "")
    return f"sample {name}", lambda: ops.sample(logits, on_gpu), peer


def pairs() -> Iterator[tuple[str, Pair]]:
    """Every case, made one at a time."""
    kernels: list[Callable[[int], Pair]] = [rms_norm, silu_and_mul, rotary_write_kv]
    for kernel in kernels:
        for num_tokens in (1, 32, 256, 8192):
            yield f"{num_tokens} tokens", kernel(num_tokens)
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (0.6, 0, 1.0), (0.6, 50, 0.9)):
        for num_rows in (1, 32, 256):
            yield f"{num_rows} rows", sampling(num_rows, temperature, top_k, top_p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="h100_layers", help="of the result file")
    arguments = parser.parse_args()
    rows = []
    for size, (name, ours, peer) in pairs():
        values = (microseconds([ours]), "us", "torch", microseconds([peer]))
        rows.append(report.row(f"{name}, {size}", *values, higher_is_better=False))
        torch.cuda.empty_cache()
    report.write(arguments.name, rows, "microseconds a call, captured in a graph")


if __name__ == "__main__":
    main()
