"""Figure 15's counts: samples and beams on the block manager, against counting by hand and by sets of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.paper import sharing
from benchmarks.paper.workloads import Lengths, LogNormalLengths


class OneRequest:
    """A data set of one pair of lengths."""

    name = "one request"

    def __init__(self, prompt_len: int, output_len: int) -> None:
        self._pair = (prompt_len, output_len)

    def sample(self, count: int, seed: int) -> Lengths:
        return Lengths(np.full(count, self._pair[0]), np.full(count, self._pair[1]))


def test_samples_share_the_full_blocks_of_the_prompt() -> None:
    saving = sharing.parallel_sampling(OneRequest(40, 30), num_samples=3, num_requests=2)
    unshared = used = 0
    for length in range(41, 71):
        unshared += 2 * 3 * -(-length // 16)
        used += 2 * (40 // 16 + 3 * (-(-length // 16) - 40 // 16))
    assert (saving.used, saving.unshared) == (used, unshared)
    assert saving.num_copies == 2 * 2, "the last block of the prompt is copied for all samples but one"
    assert sharing.parallel_sampling(OneRequest(32, 30), num_samples=3, num_requests=2).num_copies == 0


def distinct_blocks(prompt_len: int, parents: list[list[int]], width: int) -> int:
    """Blocks that differ among the beams, summed over the steps: a block is told by who wrote each of its tokens."""
    histories: list[tuple[tuple[int, int], ...]] = [tuple((0, i) for i in range(prompt_len))] * width
    total = 0
    for step, origins in enumerate(parents, 1):
        histories = [(*history, (step, beam)) for beam, history in enumerate(histories)]
        total += len({history[: at + 16] for history in histories for at in range(0, len(history), 16)})
        histories = [histories[origin] for origin in origins]
    return total


@pytest.mark.parametrize("width", sharing.WIDTHS)
def test_beams_share_what_their_histories_have_in_common(width: int) -> None:
    records = sharing.recorded_parents(width)
    assert all(len(beams) == width and set(beams) <= set(range(width)) for record in records for beams in record)
    saving = sharing.beam_search(OneRequest(21, 90), width, num_requests=len(records))
    assert saving.used == sum(distinct_blocks(21, record[:90], width) for record in records)
    assert saving.unshared == len(records) * width * sum(-(-length // 16) for length in range(22, 112))
    assert saving.num_copies < saving.num_rows


def test_sharing_grows_with_the_number_of_samples_and_more_with_beams() -> None:
    lengths = LogNormalLengths("short", 30.0, 40.0, prompt_sigma=0.5, output_sigma=0.5)
    samples = [sharing.parallel_sampling(lengths, count, 50).percent for count in sharing.WIDTHS]
    beams = [sharing.beam_search(lengths, width, 50).percent for width in sharing.WIDTHS]
    assert samples == sorted(samples) and beams == sorted(beams)
    assert all(more > less for more, less in zip(beams, samples, strict=True))
