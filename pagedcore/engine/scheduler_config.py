"""What bounds the steps that the scheduler plans."""

from __future__ import annotations

from dataclasses import dataclass

from pagedcore.engine.swap_space import PreemptionMode


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step. Without chunked prefill, `max_num_batched_tokens` must be at least the longest sequence.

    `decode_batch_sizes`: the numbers of rows, ascending, to which steps that only decode are padded, up to max_num_seqs at
    least; empty: no padding. `swap_cost_tokens`: see `KVCacheShape`.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    decode_batch_sizes: tuple[int, ...] = ()
    preemption_mode: PreemptionMode = PreemptionMode.AUTO
    swap_cost_tokens: float = 0.0
