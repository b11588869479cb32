"""Time the CUDA attention kernels against the read limit of the GPU and, where they are at hand, FlashAttention-3 and FlashInfer.

Usage: python -m benchmarks.kernels.gpu_attention [--peer FOLDER] [--flashinfer FOLDER] [--cases all|short] [--name NAME]
The first FOLDER holds `vllm_flash_attn/` (its `_vllm_fa3_C.abi3.so` and `flash_attn_interface.py`), unpacked from a vLLM 0.26
wheel; the second one flashinfer-python 0.6.14 and apache-tvm-ffi (pip install --target), which compiles its kernels on first use.
All read bf16 KV in blocks of 16 through shuffled tables; launches are captured in a graph that rotates over so many pools
that the L2 cache serves none of them. FlashInfer is timed in decode.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.kernels.gpu_timing import Launch, microseconds, read_limit
from pagedcore import ops

BLOCK_SIZE, HEAD_DIM = 16, 128
FLASH_ATTENTION, FLASHINFER = "FlashAttention-3 (vLLM 0.26)", "FlashInfer 0.6.14"
FLASHINFER_WORKSPACE = 256 << 20
ROTATED_BYTES = 200_000_000  # four times an H100's L2


@dataclass(frozen=True)
class Case:
    """Rows of `query_len` queries over contexts of `seq_lens` tokens."""

    num_heads: int
    num_kv_heads: int
    seq_lens: tuple[int, ...]
    query_len: int = 1

    @property
    def name(self) -> str:
        lengths = sorted(set(self.seq_lens), reverse=True)
        context = str(lengths[0]) if len(lengths) == 1 else "+".join(f"{self.seq_lens.count(n)}x{n}" for n in lengths)
        kind = "decode" if self.query_len == 1 else "prefill"
        return f"{kind} {self.num_heads}/{self.num_kv_heads}x{HEAD_DIM} batch {len(self.seq_lens)} context {context}"

    @property
    def kv_bytes(self) -> int:
        return 2 * sum(self.seq_lens) * self.num_kv_heads * HEAD_DIM * 2

    @property
    def flops(self) -> float:
        return 2.0 * self.num_heads * HEAD_DIM * sum(n * n for n in self.seq_lens)


@dataclass(frozen=True)
class Inputs:
    """One pool of KV with its own tables and queries."""

    q: torch.Tensor
    out: torch.Tensor
    kv: torch.Tensor
    tables: torch.Tensor


def cases(which: str) -> list[Case]:
    """The cases of the full table, or a few short ones."""
    if which == "short":
        few = (
            (1, 512),
            (1, 2048),
            (1, 32768),
            (8, 512),
            (8, 2048),
            (32, 512),
            (32, 2048),
            (64, 512),
            (256, 512),
            (256, 2048),
        )
        decode = [(32, 8, (n,) * b) for b, n in few]
        decode += [(32, 8, (65536, *(4096,) * 31)), (16, 8, (512,) * 8), (32, 32, (512,) * 8), (32, 32, (2048,) * 32)]
    else:
        shapes = ((32, 8), (16, 8), (32, 32))
        grid = [(b, n) for b in (1, 8, 32, 64, 256) for n in (512, 2048, 8192, 32768)]
        decode = [(h, k, (n,) * b) for h, k in shapes for b, n in grid if 4 * b * n * k * HEAD_DIM < 20e9]
        decode += [(h, k, (65536, *(4096,) * 31)) for h, k in shapes]
    prefill = [Case(32, 8, (n,) * b, n) for b, n in ((1, 512), (1, 2048), (1, 8192), (8, 2048))]
    return [Case(*arguments) for arguments in decode] + prefill


def make_inputs(case: Case, layout: str) -> list[Inputs]:
    """Pools of KV, "HND" [2, blocks, kv_heads, block_size, head_dim] or "NHD" [2, blocks, block_size, kv_heads, head_dim]."""
    blocks = [-(-n // BLOCK_SIZE) for n in case.seq_lens]
    pools = max(1, min(64, -(-ROTATED_BYTES // case.kv_bytes), int(30e9 // case.kv_bytes)))
    inputs = []
    for _ in range(pools):
        heads = (case.num_kv_heads, BLOCK_SIZE) if layout == "HND" else (BLOCK_SIZE, case.num_kv_heads)
        kv = torch.randn(2, sum(blocks), *heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        ids = torch.randperm(sum(blocks), dtype=torch.int32, device="cuda")
        tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device="cuda")
        for row, part in enumerate(torch.split(ids, blocks)):
            tables[row, : len(part)] = part
        q = torch.randn(len(blocks) * case.query_len, case.num_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        inputs.append(Inputs(q, torch.empty_like(q), kv, tables))
    return inputs


def our_launches(case: Case) -> list[Launch]:
    """One attention call for each pool."""
    size = ops.paged_attention_workspace_bytes(torch.device("cuda"), case.num_heads, case.num_kv_heads, HEAD_DIM)
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
    starts, lengths = row_arrays(case)

    def launch(x: Inputs) -> Launch:
        return lambda: ops.paged_attention(
            x.out, x.q, x.kv[0], x.kv[1], x.tables, starts, lengths, case.query_len, HEAD_DIM**-0.5, workspace
        )

    return [launch(x) for x in make_inputs(case, "HND")]


def flashinfer_launches(flashinfer: Any, case: Case) -> list[Launch]:
    """FlashInfer's decode with its tensor core kernels, planned beforehand."""
    blocks = torch.tensor([-(-n // BLOCK_SIZE) for n in case.seq_lens])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), blocks.cumsum(0)]).int().cuda()
    last_lens = torch.tensor([(n - 1) % BLOCK_SIZE + 1 for n in case.seq_lens], dtype=torch.int32, device="cuda")
    heads = (case.num_heads, case.num_kv_heads, HEAD_DIM)

    def launch(x: Inputs) -> Launch:
        workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        indices = torch.cat([row[:n] for row, n in zip(x.tables, blocks.tolist(), strict=True)])
        dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        wrapper.plan(starts, indices, last_lens, *heads, BLOCK_SIZE, **dtypes)
        return lambda: wrapper.run(x.q, (x.kv[0], x.kv[1]))

    return [launch(x) for x in make_inputs(case, "NHD")]


def flash_attention_launches(peer: Any, case: Case) -> list[Launch]:
    """FlashAttention-3 as vLLM calls it, with its scheduler metadata computed beforehand."""
    starts, lengths = row_arrays(case)
    longest = max(case.seq_lens)
    metadata = None
    if case.query_len == 1:
        metadata = peer.get_scheduler_metadata(
            len(case.seq_lens),
            1,
            longest,
            case.num_heads,
            case.num_kv_heads,
            HEAD_DIM,
            lengths,
            cu_seqlens_q=starts,
            page_size=BLOCK_SIZE,
            causal=True,
        )

    def launch(x: Inputs) -> Launch:
        return lambda: peer.flash_attn_varlen_func(
            x.q,
            x.kv[0],
            x.kv[1],
            case.query_len,
            starts,
            longest,
            seqused_k=lengths,
            causal=True,
            block_table=x.tables,
            out=x.out,
            scheduler_metadata=metadata,
            fa_version=3,
        )

    return [launch(x) for x in make_inputs(case, "NHD")]


def row_arrays(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """query_start_loc and seq_lens on the GPU."""
    starts = torch.arange(len(case.seq_lens) + 1, dtype=torch.int32, device="cuda") * case.query_len
    return starts, torch.tensor(case.seq_lens, dtype=torch.int32, device="cuda")


def measure(flash_attention: Any, flashinfer: Any, which: str) -> list[report.Row]:
    """Every case against the time the read limit allows (decode) and against the peers there are."""
    limit = read_limit()
    rows = []
    for case in cases(which):
        is_decode = case.query_len == 1
        ours = microseconds(our_launches(case))
        torch.cuda.empty_cache()
        speed = f"{case.kv_bytes / ours / 1e6:5.2f} TB/s" if is_decode else f"{case.flops / ours / 1e6:4.0f} TFLOP/s"
        text = f"{case.name:58s} {ours:8.1f} us {speed}"
        if is_decode:
            rows.append(report.row(case.name, ours, "us", "floor", case.kv_bytes / limit, higher_is_better=False))
        for name, module, launches in (
            (FLASH_ATTENTION, flash_attention, flash_attention_launches),
            (FLASHINFER, flashinfer if is_decode else None, flashinfer_launches),
        ):
            if module is None:
                continue
            theirs = microseconds(launches(module, case))
            torch.cuda.empty_cache()
            rows.append(report.row(case.name, ours, "us", name, theirs, higher_is_better=False))
            text += f"   {name} {theirs:8.1f} us, ratio {theirs / ours:.2f}"
        print(text, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="folder that holds vllm_flash_attn/")
    parser.add_argument("--flashinfer", type=Path, help="folder that holds flashinfer/ and tvm_ffi/")
    parser.add_argument("--cases", choices=("all", "short"), default="all")
    parser.add_argument("--name", default="h100_attention", help="of the result file")
    arguments = parser.parse_args()
    flash_attention = flashinfer = None
    if arguments.peer is not None:
        sys.path.insert(0, str(arguments.peer))
        flash_attention = importlib.import_module("vllm_flash_attn.flash_attn_interface")
    if arguments.flashinfer is not None:
        sys.path.insert(0, str(arguments.flashinfer))
        flashinfer = importlib.import_module("flashinfer")
    report.write(arguments.name, measure(flash_attention, flashinfer, arguments.cases))


if __name__ == "__main__":
    main()
