"""When a beam search ends: a case small enough to be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pagedcore.engine.beam_search import BeamSearch
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.sequence_group import SequenceGroup

STOP = 9


def search_of(early_stopping: bool | str) -> tuple[SequenceGroup, BeamSearch]:
    params = SamplingParams(temperature=0, beam_width=2, max_tokens=10, early_stopping=early_stopping)
    group = SequenceGroup(Sequence(0, Request("x", [7], params), 11, frozenset({STOP}), 0))
    assert group.search is not None
    return group, group.search


def step(group: SequenceGroup, search: BeamSearch, *reports: list[tuple[int, float]]) -> list[tuple[int, int, float]]:
    """Let every beam report (token, log probability); returns the continuations."""
    for beam, report in zip(group.sequences, reports, strict=True):
        token_ids, logprobs = zip(*report, strict=True)
        search.take(beam, np.array(token_ids, np.int32), np.array(logprobs, np.float32))
    chosen = search.choose(group.sequences)
    group.replace_beams(chosen, iter(range(1, 99)).__next__)
    return [(beam, token, round(float(logprob), 4)) for beam, token, logprob in chosen]


# The third token's log probability; with it the best open beam has -3 or -1.05 in all, at length 2. Two beams have ended
# with -0.1 / 1 and -1.1 / 2; the open one would have -3 / 2, -1.05 / 2 or, at the greatest length, -3 / 10.
@pytest.mark.parametrize(
    ("early_stopping", "logprob", "goes_on"),
    [(True, -2.0, False), (True, -0.05, False), (False, -2.0, False), (False, -0.05, True), ("never", -2.0, True)],
)
def test_the_search_ends_by_its_rule(early_stopping: bool | str, logprob: float, goes_on: bool) -> None:
    group, search = search_of(early_stopping)
    assert step(group, search, [(STOP, -0.1), (1, -1.0), (2, -1.2)]) == [(0, 1, -1.0), (0, 2, -1.2)]
    reports = [(STOP, -0.1), (3, logprob), (4, -3.0)], [(5, -5.0), (STOP, -6.0), (6, -7.0)]
    chosen = step(group, search, reports[0], reports[1])
    assert chosen == ([(0, 3, round(logprob - 1, 4)), (0, 4, -4.0)] if goes_on else [])
    assert [(beam.token_ids, round(beam.score, 4)) for beam in search.ended] == [([STOP], -0.1), ([1, STOP], -0.55)]
