"""Threads that send responses keep out of the engine thread's way, but none waits for long."""

from __future__ import annotations

import threading
import time

import pytest

from pagedcore.engine import host_turn
from pagedcore.engine.engine_thread import EngineThread
from pagedcore.engine.host_turn import HostTurn
from pagedcore.engine.queue_limits import QueueLimits
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_params import SamplingParams
from tests.engine.test_engine_thread import Collector
from tests.engine.test_schedule_invariance import make_engine

WAIT = 20.0


def test_others_go_on_when_the_engine_waits_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_turn, "_MAX_WAIT_SECONDS", WAIT)
    turn = HostTurn()
    turn.wait()  # an idle engine stops nobody
    turn.begin()
    passed = threading.Event()

    def send() -> None:
        turn.wait()
        passed.set()

    sender = threading.Thread(target=send)
    sender.start()
    assert not passed.wait(0.05)
    with turn.handed_over():
        assert passed.wait(WAIT)
    sender.join()
    turn.end()
    turn.wait()


def test_nobody_waits_longer_than_a_moment() -> None:
    turn = HostTurn()
    turn.begin()
    begin = time.monotonic()
    turn.wait()
    assert time.monotonic() - begin < WAIT


def test_the_engine_thread_hands_over_in_a_step_and_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_turn, "_MAX_WAIT_SECONDS", WAIT)
    engine, executor, _ = make_engine()
    executor.hang, executor.hang_from = threading.Event(), 2
    thread = EngineThread(engine, QueueLimits())
    thread.start()
    sink = Collector()
    thread.submit(Request("a", [1] * 5, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)), sink)
    begin = time.monotonic()
    for _ in range(20):
        thread.let_go_first()  # it hangs in a step, that is, waits for its device
    executor.hang.set()
    assert sink.ended.wait(WAIT)
    thread.let_go_first()
    assert time.monotonic() - begin < WAIT
    thread.shutdown()
    thread.let_go_first()  # nor does one that has ended stop anybody
