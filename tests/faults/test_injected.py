"""Exceptions inside the model: whose request they are ends with an error, everybody else's goes on, and all blocks come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pagedcore.serve.triton_server import TritonServer
from tests.faults import triggers
from tests.faults.conftest import Measure
from tests.triton.clients import Answer, generate, generate_grpc, grpc_stream, metric, wait_until
from tests.triton.samples import Growth

INTERNAL = "Error generating stream: internal error ({}), see the server's log"


def greedy(max_tokens: int, prompt: str | list[int] = "Once upon a time", **parameters: Any) -> dict[str, Any]:
    """Inputs of a request that streams so many tokens."""
    sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **parameters}
    name = "text_input" if isinstance(prompt, str) else "input_ids"
    return {name: prompt, "stream": True, "sampling_parameters": json.dumps(sampling)}


def free_blocks(server: TritonServer) -> float:
    return metric(server.metrics_url, "pagedcore:kv_blocks_free")


@pytest.fixture(autouse=True)
def nothing_is_left(faulty: TritonServer) -> Iterator[None]:
    """After each fault the server answers as before, and every block is free."""
    good = greedy(12)
    before = generate_grpc(faulty.grpc_url, good)
    assert before.error is None
    yield
    assert generate_grpc(faulty.grpc_url, good).text == before.text
    wait_until(lambda: free_blocks(faulty) == metric(faulty.metrics_url, "pagedcore:kv_blocks_total"))


def beside(server: TritonServer, fault: dict[str, Any]) -> tuple[Answer, Answer, Answer]:
    """What a good request says alone, what it says when the fault comes while it runs, and what the faulty one says."""
    good = greedy(40)
    alone = generate_grpc(server.grpc_url, good)
    with grpc_stream(server.grpc_url) as stream:
        stream.send(good)
        texts = stream.next()[1]
        answer = generate_grpc(server.grpc_url, fault)
        try:
            while len(texts) < 40:
                texts += stream.next()[1]
        except Exception as error:
            return alone, Answer(texts, str(error)), answer
    return alone, Answer(texts), answer


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (triggers.TOKENIZER_RAISES, INTERNAL.format("RuntimeError")),
        (triggers.NO_MEMORY, INTERNAL.format("MemoryError")),
        (triggers.DETOKENIZER_RAISES, INTERNAL.format("RuntimeError")),
        ([1, triggers.NAN_LOGITS], "not finite"),
    ],
    ids=["tokenizer", "memory", "detokenizer", "nan"],
)
def test_one_request_fails_alone(faulty: TritonServer, prompt: str | list[int], error: str) -> None:
    alone, good, bad = beside(faulty, greedy(8, prompt))
    assert good.text == alone.text
    assert bad.texts == []
    assert error in (bad.error or "")


@pytest.mark.parametrize("token_id", [triggers.STEP_RAISES, triggers.SAMPLER_RAISES], ids=["step", "sampler"])
def test_a_failed_step_ends_its_requests_and_no_others(faulty: TritonServer, token_id: int) -> None:
    """What was in the step is told; the tokens that came before are right."""
    alone, good, bad = beside(faulty, greedy(8, [1, token_id]))
    error = INTERNAL.format("RuntimeError")
    assert (bad.texts, bad.error) == ([], error)
    assert good.error is not None
    assert error in good.error
    assert alone.text.startswith(good.text)


def test_a_request_lost_before_the_engine_is_logged_and_counted(faulty: TritonServer) -> None:
    growth = Growth(faulty)
    answer = generate(faulty.http_url, greedy(2, triggers.SUBMIT_RAISES), stream=True)
    assert (answer.error, answer.num_responses) == (INTERNAL.format("RuntimeError"), 1)
    growth.wait_for("pagedcore:requests_refused_total", 1, reason="internal")
    assert "RuntimeError: the way to the engine is broken" in faulty.log_path.read_text()


def test_a_metric_that_fails_is_made_up_for(faulty: TritonServer) -> None:
    """Each counter fails once, and still shows everything that has happened; the log tells of it once a time, not each round."""
    growth = Growth(faulty)
    assert generate_grpc(faulty.grpc_url, greedy(3, triggers.METRICS_RAISE)).error is None
    assert generate_grpc(faulty.grpc_url, greedy(4)).error is None
    growth.wait_for("vllm:generation_tokens_total", 7)
    growth.wait_for("vllm:request_success_total", 2, finished_reason="length")
    assert faulty.log_path.read_text().count("the metrics could not be brought up to date") == 1


def test_two_failed_steps_in_a_row_are_not_three(faulty: TritonServer) -> None:
    """A step that succeeds starts the count anew."""
    for _ in range(3):
        for _ in range(2):
            assert generate_grpc(faulty.grpc_url, greedy(2, [triggers.STEP_RAISES])).error
        assert generate_grpc(faulty.grpc_url, greedy(2)).error is None


def test_over_http_a_fault_before_the_first_token_is_all_of_the_answer(faulty: TritonServer) -> None:
    answer = generate(faulty.http_url, greedy(2, [triggers.STEP_RAISES]), stream=True)
    assert (answer.error, answer.num_responses) == (INTERNAL.format("RuntimeError"), 1)


def test_a_deadline_is_kept_while_a_step_hangs(faulty: TritonServer, measure: Measure) -> None:
    inputs = greedy(8, [1, triggers.SLOW_STEP])
    with grpc_stream(faulty.grpc_url) as stream:
        stream.send(inputs, timeout=500_000)
        elapsed: list[str] = []
        seconds = wait_until(lambda: bool(elapsed) or _failed(stream, elapsed))
    assert "deadline of 500 ms exceeded" in elapsed[0]
    measure(seconds, triggers.SLOW_SECONDS)


def _failed(stream: Any, errors: list[str]) -> bool:
    try:
        stream.next()
    except Exception as error:
        errors.append(str(error))
    return bool(errors)


@pytest.mark.parametrize("every", [2, 3, 7])
def test_a_block_manager_that_finds_no_room_now_and_then_costs_time_only(faulty: TritonServer, every: int) -> None:
    prompts = ["Once upon a time", "The capital of France", "1 2 3 4 5"]
    alone = [generate_grpc(faulty.grpc_url, greedy(40, prompt)).text for prompt in prompts]
    generate_grpc(faulty.grpc_url, greedy(1, f"{triggers.REFUSE}{every}"))
    with ThreadPoolExecutor() as clients:
        answers = list(clients.map(lambda prompt: generate_grpc(faulty.grpc_url, greedy(40, prompt)), prompts))
    generate_grpc(faulty.grpc_url, greedy(1, f"{triggers.REFUSE}0"))
    assert [(answer.text, answer.error) for answer in answers] == [(text, None) for text in alone]


def test_a_swap_that_fails_half_way_ends_the_requests_of_its_step(faulty: TritonServer) -> None:
    """None of them goes on with K/V that are not its own."""
    prompts = [f"{word} a" * 200 for word in (" one", " two", " six")]
    alone = [generate_grpc(faulty.grpc_url, greedy(80, prompt)).text for prompt in prompts]
    generate_grpc(faulty.grpc_url, greedy(1, triggers.SWAP_RAISES))
    with ThreadPoolExecutor() as clients:
        answers = list(clients.map(lambda prompt: generate_grpc(faulty.grpc_url, greedy(80, prompt)), prompts))
    errors = [answer.error for answer in answers if answer.error is not None]
    assert errors
    assert set(errors) == {INTERNAL.format("RuntimeError")}
    for text, answer in zip(alone, answers, strict=True):
        assert text == answer.text if answer.error is None else text.startswith(answer.text)


def test_a_wall_clock_that_jumps_ends_nothing(faulty: TritonServer) -> None:
    """Back to 1970, under a request with a deadline."""
    with grpc_stream(faulty.grpc_url) as stream:
        stream.send(greedy(30), timeout=60_000_000)
        stream.next()
        assert generate_grpc(faulty.grpc_url, greedy(1, triggers.CLOCK_JUMPS)).error is None
        while not stream.next()[2]:
            pass
