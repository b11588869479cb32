"""Parts `fig18a` and `fig19a`: attention on paged against contiguous K/V, and moving blocks to the host and back."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.gpu_timing import Launch, microseconds
from benchmarks.paper.gpu.record import Recorder, TimeBox
from pagedcore import ops

# The paper's figure 18a, and a longer context. OPT-13B has 40 heads of 128.
BATCHES, CONTEXTS = (8, 32), (64, 128, 256, 1024)
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROTATED_BYTES = 200_000_000  # more than the last-level cache of any GPU so far holds
MOVED_TOKENS = 512
GPU_MIN_BLOCK_SIZE = 16  # of the attention kernel


@dataclass(frozen=True)
class KernelShape:
    """Heads of one layer, and layers of a cache."""

    num_heads: int
    head_dim: int
    num_layers: int
    dtype: torch.dtype


SHAPES = {
    "opt13b": KernelShape(40, 128, 40, torch.bfloat16),
    "tiny": KernelShape(2, 32, 2, torch.bfloat16),
}


def time_launches(launches: list[Launch], device: str) -> float:
    """Median microseconds of one launch."""
    if device == "cuda":
        return microseconds(launches)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for launch in launches:
            launch()
        times.append((time.perf_counter() - begin) / len(launches) * 1e6)
    return statistics.median(times)


class AttentionCase:
    """Decoding rows of equal contexts, over as many copies of K/V as keep the cache from serving them."""

    def __init__(self, shape: KernelShape, batch: int, context: int, device: str) -> None:
        self._shape, self._batch, self._context, self._device = shape, batch, context, device
        bytes_each = 2 * batch * context * shape.num_heads * shape.head_dim * 2
        self._num_copies = max(1, min(64, -(-ROTATED_BYTES // bytes_each))) if device == "cuda" else 2

    def _random(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, dtype=self._shape.dtype, device=self._device)

    def _queries(self) -> torch.Tensor:
        return self._random(self._batch, self._shape.num_heads, self._shape.head_dim)

    def paged(self, block_size: int, *, consecutive: bool) -> list[Launch]:
        """Our kernel; the blocks of a row lie one behind the other, as in contiguous K/V, or anywhere."""
        shape, device = self._shape, torch.device(self._device)
        per_row = -(-self._context // block_size)
        num_blocks = per_row * self._batch
        size = ops.paged_attention_workspace_bytes(device, shape.num_heads, shape.num_heads, shape.head_dim)
        workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        starts = torch.arange(self._batch + 1, dtype=torch.int32, device=device)
        lengths = torch.full((self._batch,), self._context, dtype=torch.int32, device=device)

        def launch() -> Launch:
            kv = self._random(2, num_blocks, shape.num_heads, block_size, shape.head_dim)
            ids = torch.arange(num_blocks) if consecutive else torch.randperm(num_blocks)
            tables = ids.to(device, torch.int32).view(self._batch, per_row).contiguous()
            q = self._queries()
            out = torch.empty_like(q)
            scale = shape.head_dim**-0.5
            return lambda: ops.paged_attention(out, q, kv[0], kv[1], tables, starts, lengths, 1, scale, workspace)

        return [launch() for _ in range(self._num_copies)]

    def contiguous(self) -> list[Launch]:
        """torch's attention on contiguous K/V [batch, heads, context, head_dim], by the backend that it chooses."""
        shape = self._shape

        def launch() -> Launch:
            q = self._queries()[:, :, None]
            k, v = (self._random(self._batch, shape.num_heads, self._context, shape.head_dim) for _ in range(2))
            return lambda: scaled_dot_product_attention(q, k, v)

        return [launch() for _ in range(self._num_copies)]


def attention(shape_name: str, device: str, recorder: Recorder, box: TimeBox) -> None:
    """Our kernel through shuffled and through consecutive tables, and torch's on contiguous K/V, then by block size."""
    shape = SHAPES[shape_name]
    smallest = GPU_MIN_BLOCK_SIZE if device == "cuda" else 1
    with torch.inference_mode():
        for batch in BATCHES:
            for context in CONTEXTS:
                key = "kernel", f"batch {batch}", f"context {context}"
                if recorder.record.find(*key) is not None or not box.has(6.0):
                    continue
                case = AttentionCase(shape, batch, context, device)
                recorder.add(
                    *key,
                    paged_us=time_launches(case.paged(16, consecutive=False), device),
                    consecutive_us=time_launches(case.paged(16, consecutive=True), device),
                    torch_us=time_launches(case.contiguous(), device),
                )
        for size in [size for size in BLOCK_SIZES if size >= smallest]:
            by_size = "kernel", "batch 32", "context 1024", f"blocks of {size}"
            if recorder.record.find(*by_size) is None and box.has(3.0):
                case = AttentionCase(shape, 32, 1024, device)
                recorder.add(*by_size, paged_us=time_launches(case.paged(size, consecutive=False), device))


def moves(shape_name: str, device: str, recorder: Recorder, box: TimeBox) -> None:
    """Milliseconds to move a request of MOVED_TOKENS tokens out, and in, by block size."""
    shape = SHAPES[shape_name]
    pin = device == "cuda"
    with torch.inference_mode():
        for size in BLOCK_SIZES:
            key = "swap", f"blocks of {size}"
            if recorder.record.find(*key) is not None or not box.has(4.0):
                continue
            num_blocks = MOVED_TOKENS // size
            sizes = (shape.num_layers, 2, 2 * num_blocks, shape.num_heads, size, shape.head_dim)
            cache = torch.zeros(sizes, dtype=shape.dtype, device=device)
            host = torch.zeros(sizes, dtype=shape.dtype, pin_memory=pin)
            chosen = torch.stack([torch.randperm(2 * num_blocks)[:num_blocks] for _ in range(2)], 1)
            pairs = chosen.to(device, torch.int32).contiguous()
            back = pairs.flip(1).contiguous()
            recorder.add(
                *key,
                out_ms=_milliseconds(partial(ops.swap_blocks, cache, host, pairs), device),
                in_ms=_milliseconds(partial(ops.swap_blocks, host, cache, back), device),
            )


def _milliseconds(move: Launch, device: str) -> float:
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        move()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[1:])
