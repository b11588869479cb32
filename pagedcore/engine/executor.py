"""The seam between control plane and data plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pagedcore.engine.step_plan import Int32Array, StepPlan, StepResult
from pagedcore.engine.step_sizes import StepSizes


@dataclass(frozen=True)
class KVCacheShape:
    """How many blocks the executor has room for, and what a model needs of them.

    `swap_cost_tokens`: how many tokens the device computes in the time in which a block goes to the host and comes back.
    """

    num_blocks: int
    num_host_blocks: int
    block_size: int
    swap_cost_tokens: float = 0.0


class PendingStep(Protocol):
    """A launched step."""

    def wait(self) -> StepResult:
        """Block until the step is done (without the GIL); raises what the step raised."""
        ...


class Executor(Protocol):
    """Runs planned steps in the order of their launches, on one device or many.

    `step_sizes`: the sizes to which it wants steps padded.
    """

    kv_cache_shape: KVCacheShape
    step_sizes: StepSizes

    def step_buffers(self) -> list[Int32Array]:
        """Three buffers, large enough for any step, in memory the device reads fast. The scheduler fills them in turn."""
        ...

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step; returns at once. Ids of earlier steps that the plan refers to are taken on the device."""
        ...

    def shutdown(self) -> None:
        """Finish what was launched and release the device."""
        ...
