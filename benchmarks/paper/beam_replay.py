"""Lets beams descend from each other as in a recorded search, whatever a model says or whether there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from benchmarks.paper.workloads import FIRST_FREE_TOKEN
from pagedcore.engine.step_plan import StepPlan, StepResult

_UNLIKELY = -1e6  # below what beams can add up to

BeamParents = Mapping[str, list[list[int]]]  # by request id; see `TraceRequest.beam_parents`


def with_recorded_beams(plan: StepPlan, result: StepResult, parents_of: BeamParents) -> StepResult:
    """`result` with candidates of which the search takes the recorded ones.

    The new beam of rank i comes to a log probability of -i in all: its parent of rank j has -j already.
    """
    num_rows = len(result.token_ids)
    most = max(plan.sequences[row].group.width for row in plan.beam_rows)
    top_ids = np.tile(FIRST_FREE_TOKEN + np.arange(most, dtype=np.int32), (num_rows, 1))
    top_logprobs = np.full((num_rows, most), _UNLIKELY, dtype=np.float32)
    for row in plan.beam_rows:
        beam = plan.sequences[row]
        group = beam.group
        if plan.step_id < beam.valid_from or beam not in group.sequences:
            continue  # what it draws is dropped
        rank = group.sequences.index(beam)
        step = beam.num_output_tokens
        parents = parents_of[group.request_id][step - 1] if step else [0] * group.width
        for new_rank, parent in enumerate(parents):
            if parent == rank:
                top_logprobs[row, new_rank] = rank - new_rank
    return replace(result, top_logprobs=top_logprobs, top_token_ids=top_ids)
