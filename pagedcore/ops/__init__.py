"""The border between tensors and kernels: checks shape, dtype, layout and device, then passes addresses and sizes on.

A mistake here is the programmer's: ValueError says what is expected and what was given. Values inside tensors (slots, block
numbers, lengths) are not checked. Every function runs on its tensors' device: on the CPU it returns when the work is done, on a
GPU it enqueues on the current stream.
"""

from pagedcore.ops.attention import (
    copy_blocks,
    paged_attention,
    paged_attention_workspace_bytes,
    rotary_write_kv,
    swap_blocks,
)
from pagedcore.ops.cpu import CpuGraph, instruction_set, num_threads, request_huge_pages, set_num_threads
from pagedcore.ops.elementwise import layer_norm, relu, rms_norm, silu_and_mul
from pagedcore.ops.linear import (
    INVARIANT_ROWS,
    PackedWeight,
    WeightArena,
    gated_linear,
    invariant_linear,
    invariant_rows,
    linear,
    pack_linear,
    packed_linear,
)
from pagedcore.ops.sampling import logprobs, sample
from pagedcore.ops.step import StepEnqueuer, unpack_step

__all__ = [
    "INVARIANT_ROWS",
    "CpuGraph",
    "PackedWeight",
    "StepEnqueuer",
    "WeightArena",
    "copy_blocks",
    "gated_linear",
    "instruction_set",
    "invariant_linear",
    "invariant_rows",
    "layer_norm",
    "linear",
    "logprobs",
    "num_threads",
    "pack_linear",
    "packed_linear",
    "paged_attention",
    "paged_attention_workspace_bytes",
    "relu",
    "request_huge_pages",
    "rms_norm",
    "rotary_write_kv",
    "sample",
    "set_num_threads",
    "silu_and_mul",
    "swap_blocks",
    "unpack_step",
]
