"""What bounds the steps that the scheduler plans."""

from __future__ import annotations

from dataclasses import dataclass

from pagedcore.engine.step_sizes import NO_PADDING, StepSizes
from pagedcore.engine.swap_space import PreemptionMode


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step. Without chunked prefill, `max_num_batched_tokens` must be at least the longest sequence.

    `swap_cost_tokens`: see `KVCacheShape`. `watermark`: the share of the blocks that admission leaves free, so that the newcomer
    is not preempted at once.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    step_sizes: StepSizes = NO_PADDING
    preemption_mode: PreemptionMode = PreemptionMode.AUTO
    swap_cost_tokens: float = 0.0
    watermark: float = 0.01
