"""Figure 15's counts, taken from the engine at work, against counting by hand and by sets of tokens."""

from __future__ import annotations

import pytest

from benchmarks.paper.simulator import Sharing, SimulationConfig, simulate
from benchmarks.paper.step_time import StepTime
from benchmarks.paper.workloads import FIRST_FREE_TOKEN, TraceRequest, recorded_parents

WIDTHS = (2, 4, 6)


def serve(prompt_len: int, output_len: int, width: int, parents: list[list[int]] | None = None) -> Sharing:
    """One request alone in the engine. The second request only marks the end of what is counted."""
    config = SimulationConfig("paged", StepTime(1.0, 0.0, 0.0), num_slots=16_000)
    prompt = [FIRST_FREE_TOKEN] * prompt_len
    last = TraceRequest(10_000.0, prompt, 1)
    result = simulate(config, [TraceRequest(0.0, prompt, output_len, width, parents), last])
    assert result.preemptions == 0
    return result.sharing


def test_samples_share_the_full_blocks_of_the_prompt() -> None:
    prompt_len, output_len, width = 40, 30, 3
    saving = serve(prompt_len, output_len, width)
    unshared = used = 0
    for length in range(prompt_len, prompt_len + output_len):
        blocks = -(-length // 16)
        unshared += width * blocks
        used += 40 // 16 + (width if length > prompt_len else 1) * (blocks - 40 // 16)
    assert (saving.used, saving.unshared) == (used, unshared)
    assert saving.num_copies == 2, "the last block of the prompt is copied for all samples but one"
    assert serve(32, output_len, width).num_copies == 0


def distinct_blocks(prompt_len: int, parents: list[list[int]], width: int) -> int:
    """Blocks that differ among the beams, summed over the steps: a block is told by who wrote each of its tokens."""
    histories: list[tuple[tuple[int, int], ...]] = [tuple((0, i) for i in range(prompt_len))] * width
    total = -(-prompt_len // 16)
    for step, origins in enumerate(parents, 1):
        histories = [(*history, (step, beam)) for beam, history in enumerate(histories)]
        total += len({history[: at + 16] for history in histories for at in range(0, len(history), 16)})
        histories = [histories[origin] for origin in origins]
    return total


@pytest.mark.parametrize("width", WIDTHS)
def test_beams_share_what_their_histories_have_in_common(width: int) -> None:
    for record in recorded_parents(width):
        assert all(len(beams) == width and set(beams) <= set(range(width)) for beams in record)
        saving = serve(21, 91, width, record)
        assert saving.used == distinct_blocks(21, record[:90], width)
        assert saving.unshared == width * sum(-(-length // 16) for length in range(21, 112))
        assert 0 < saving.num_copies < saving.num_rows
