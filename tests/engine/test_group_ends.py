"""How a group or one of its sequences ends early: by order, abort, failed step or bad logits."""

from __future__ import annotations

import itertools

import pytest

from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import FinishReason
from pagedcore.errors import NonFiniteLogitsError
from tests.engine.group_runs import Run, expected_outputs, make_mixed_requests, start
from tests.engine.test_schedule_invariance import make_engine


def test_one_sequence_can_be_ended_and_the_others_go_on() -> None:
    for at in range(1, 50):
        budget = 8 if at % 3 else 32  # with the small one, what is in common is recomputed in several steps
        run = start(
            num_blocks=26,
            max_num_seqs=8,
            max_num_batched_tokens=budget,
            num_host_blocks=100 * (at % 2),
            enable_prefix_caching=False,
        )
        request = Request("x", list(range(21)), SamplingParams(n=4, seed=1, max_tokens=12, ignore_eos=True))
        run.add(
            *[Request(f"other{i}", [i] * 9, SamplingParams(seed=i, n=2, ignore_eos=True)) for i in range(2)],
            request,
        )
        for step in itertools.count():
            if step == at:
                run.take(run.engine.end_sequence("x", 2))
                run.take(run.engine.end_sequence("x", 2))
                assert run.engine.end_sequence("y", 0) == []
            if not run.engine.has_work():
                break
            run.take(run.engine.step())
            run.blocks.check_integrity()
        assert run.blocks.num_free_blocks == run.blocks.num_blocks
        wanted = expected_outputs([request])
        reasons = [message.finish_reason for message in run.messages["x"] if message.index == 2]
        assert reasons[-1] in (FinishReason.STOP, FinishReason.LENGTH)
        for index in range(4):
            tokens = run.outputs["x", index]
            assert tokens == wanted["x", index][: len(tokens)]
            assert index == 2 or tokens == wanted["x", index]


@pytest.mark.parametrize("best_of", [3, 4])  # the second one: outputs are held until all have ended
def test_progress_counts_what_ended_sequences_have_generated(best_of: int) -> None:
    run = start(num_blocks=64)
    run.add(Request("x", [3] * 9, SamplingParams(n=3, best_of=best_of, seed=1, max_tokens=30, ignore_eos=True)))
    for _ in range(8):
        run.take(run.engine.step())
    before = run.engine.progress("x").num_output_tokens
    assert before == best_of * 7, "the last step is in flight"
    run.take(run.engine.end_sequence("x", 1))
    assert run.engine.progress("x").num_output_tokens == before


@pytest.mark.parametrize("one_step_ahead", [False, True])
def test_an_abort_at_any_step_ends_the_whole_request_with_one_message(one_step_ahead: bool) -> None:
    for at in range(0, 40, 3):
        run = start(num_blocks=40, one_step_ahead=one_step_ahead, num_host_blocks=100 * (at % 2), max_num_seqs=16)
        requests = make_mixed_requests(at, 10)
        run.add(*requests)
        for step in itertools.count():
            for victim in ("r2", "r7") if step == at else ():
                output = run.engine.abort(victim)
                run.take([] if output is None else [output])
                assert run.engine.abort(victim) is None
            if not run.engine.has_work():
                break
            run.take(run.engine.step())
            run.blocks.check_integrity()
        wanted = expected_outputs([request for request in requests if request.request_id not in ("r2", "r7")])
        assert {key: tokens for key, tokens in run.outputs.items() if key in wanted} == wanted
        assert run.blocks.num_free_blocks == run.blocks.num_blocks


def test_a_failed_step_ends_its_requests_once_and_those_of_the_step_behind_it_are_recomputed() -> None:
    for at in range(2, 40):
        engine, executor, blocks = make_engine(max_num_seqs=16, num_blocks=40, num_host_blocks=100 * (at % 2))
        executor.fail_steps = {at, at + 1}  # the second was launched before the first was known to fail
        run = Run(engine, blocks)
        requests = make_mixed_requests(at, 14)
        run.add(*requests)
        while engine.has_work():
            run.take(engine.step())
            blocks.check_integrity()
        failed = {name for name, messages in run.messages.items() if messages[-1].error is not None}
        assert failed and all(messages[-1].request_finished for messages in run.messages.values())
        wanted = expected_outputs([request for request in requests if request.request_id not in failed])
        assert {key: tokens for key, tokens in run.outputs.items() if key in wanted} == wanted
        assert blocks.num_free_blocks == blocks.num_blocks


def test_logits_that_are_not_finite_end_the_whole_request() -> None:
    engine, executor, blocks = make_engine()
    executor.broken_steps = {2}
    run = Run(engine, blocks)
    run.add(Request("x", list(range(9)), SamplingParams(n=3, max_tokens=8, ignore_eos=True)))
    run.to_the_end()
    assert isinstance(run.messages["x"][-1].error, NonFiniteLogitsError)
    assert len([message for message in run.messages["x"] if message.finish_reason is not None]) == 1
