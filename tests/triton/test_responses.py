"""Response streams and lanes: order, merging, and exactly one final response on every path."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from pagedcore_triton.protocol import SequenceDelta
from pagedcore_triton.responses import ErrorCode
from pagedcore_triton.senders import NUM_LANES, SenderPool

from pagedcore.engine.sequence import FinishReason
from pagedcore.errors import DeadlineError, EngineDeadError, NonFiniteLogitsError, OverloadedError, RequestError
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.text import Tokenizer, load_tokenizer
from tests.triton.recording import WAIT, Client, RecordingChannel, RecordingEngine, three_of_one_lane, until


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ensure_default_model())


@pytest.fixture
def engine() -> RecordingEngine:
    return RecordingEngine()


@pytest.fixture
def pool(engine: RecordingEngine) -> Iterator[SenderPool]:
    pool = SenderPool(engine)
    pool.start()
    yield pool
    pool.stop(WAIT)
    assert not [misuse for channel in engine.channels for misuse in channel.misused]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pagedcore-")]


def test_an_idle_lane_sends_every_token_and_the_last_is_final(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("one two three")
    client = Client(pool, engine, tokenizer, "a")
    for number, token_id in enumerate(ids):
        client.push(token_id, reason=FinishReason.LENGTH if number == len(ids) - 1 else None)
    assert client.result() == [tokenizer.token_text(i) for i in ids]
    assert client.channel.finals == 1


def test_a_request_that_does_not_stream_gets_one_response(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer
) -> None:
    client = Client(pool, engine, tokenizer, "a", stream=False, prefix="Count: ")
    for token_id in tokenizer.encode("one two three"):
        client.push(token_id)
    client.push(tokenizer.eos_token_id or 0, reason=FinishReason.STOP)
    assert client.result() == ["Count: one two three"]


def test_every_token_has_a_response_but_only_whole_characters_are_shown(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("🙂!")
    assert len(ids) > 2
    client = Client(pool, engine, tokenizer, "a")
    for token_id in ids:
        client.push(token_id)
    client.push(tokenizer.eos_token_id or 0, reason=FinishReason.STOP)
    assert client.result() == [*[""] * (len(ids) - 2), "🙂", "!", ""]


def test_a_backlogged_lane_merges_and_sends_first_tokens_first(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer
) -> None:
    log: list[tuple[RecordingChannel, str]] = []
    a, b, new = three_of_one_lane(pool, engine, tokenizer, log)
    one, two, three = tokenizer.encode("one two three")
    b.push(one)
    until(lambda: b.channel.sent)
    a.channel.gate.clear()
    a.push(one)
    assert a.channel.blocked.wait(WAIT)
    for token_id in (two, three):  # pile up behind the blocked send
        a.push(token_id)
        b.push(token_id)
        new.push(token_id)
    log.clear()
    a.channel.gate.set()
    until(lambda: len(log) == 5)
    names = {a.channel: "a", b.channel: "b", new.channel: "new"}
    assert [(names[channel], text) for channel, text in log] == [
        ("a", "one"),
        ("new", " two three"),
        ("a", " two three"),
        ("b", " two"),  # alone in line: the lane is idle again
        ("b", " three"),
    ]


def test_a_backlogged_lane_sends_what_ends_before_what_goes_on(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer
) -> None:
    """However long it has been in line; its client may be waiting to send the next request."""
    log: list[tuple[RecordingChannel, str]] = []
    a, b, c = three_of_one_lane(pool, engine, tokenizer, log)
    one, two, three = tokenizer.encode("one two three")
    for client in (a, b, c):
        client.push(one)
        until(lambda client=client: client.channel.sent)
    a.channel.gate.clear()
    a.channel.blocked.clear()
    a.push(two)
    assert a.channel.blocked.wait(WAIT)
    b.push(two)
    c.push(two)
    b.push(three)
    c.push(three, reason=FinishReason.LENGTH)
    log.clear()
    a.channel.gate.set()
    until(lambda: len(log) >= 4)
    names = {a.channel: "a", b.channel: "b", c.channel: "c"}
    assert [(names[channel], text) for channel, text in log] == [
        ("a", " two"),
        ("c", " two three"),
        ("b", " two"),  # alone in line, and not behind what is over
        ("b", " three"),
    ]
    assert c.channel.finals == 1


def test_a_response_tells_the_next_token_of_every_open_sequence(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer
) -> None:
    """However the engine's outputs arrive, so that the number of responses is that of the longest sequence's tokens."""
    one, two, three = tokenizer.encode("one two three")
    client = Client(pool, engine, tokenizer, "a", num_sequences=3)
    client.push(one, index=2)
    client.push(two, index=0)
    client.push(three, index=2)
    client.push(one, index=1, reason=FinishReason.LENGTH)
    until(lambda: client.channel.sent == [" two|one|one"])
    client.push(two, index=2, reason=FinishReason.LENGTH)
    client.push(three, index=0)
    client.push(three, index=0, reason=FinishReason.LENGTH)
    assert client.result() == [" two|one|one", " three|| three", " three|| two"]
    assert [[sequence.finish_reason for sequence in delta] for delta in client.channel.deltas] == [
        [None, FinishReason.LENGTH, None],
        [None, FinishReason.LENGTH, None],
        [FinishReason.LENGTH] * 3,
    ]
    assert not engine.aborted


def test_a_stop_string_ends_its_sequence_only(pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer) -> None:
    one, two, three = tokenizer.encode("one two three")
    client = Client(pool, engine, tokenizer, "a", num_sequences=2, stop=" two")
    for first, second in ((one, one), (two, three)):
        client.push(first, index=0)
        client.push(second, index=1)
    until(lambda: len(client.channel.sent) == 2)
    until(lambda: engine.ended == [("a", 0)])
    client.push(one, index=0)  # computed before the engine heard of it
    client.push(three, index=1)
    client.push(two, index=1)
    assert client.result() == ["one|one", "| three", "| three", "|"]
    assert client.channel.deltas[1][0] == SequenceDelta("", FinishReason.STOP, [two])
    assert client.channel.deltas[2][0].token_ids == []
    until(lambda: engine.ended == [("a", 0), ("a", 1)])
    assert not engine.aborted


def test_a_failure_ends_all_sequences(pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer) -> None:
    one = tokenizer.encode("one")[0]
    for reason in (FinishReason.ERROR, FinishReason.ABORT):
        client = Client(pool, engine, tokenizer, reason.value, num_sequences=2)
        client.push(one, index=1)
        client.push(reason=reason, error=EngineDeadError("it died") if reason is FinishReason.ERROR else None)
        assert client.result()[-1][0] is (
            ErrorCode.UNAVAILABLE if reason is FinishReason.ERROR else ErrorCode.CANCELLED
        )
        assert client.channel.finals == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_request_and_stops_the_engine(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    client = Client(pool, engine, tokenizer, "a", stream=stream, stop="three")
    for token_id in tokenizer.encode("one two three four"):
        client.push(token_id)
    assert "".join(str(text) for text in client.result()) == "one two "
    until(lambda: engine.ended == [("a", 0)])
    assert not engine.aborted
    client.push(*tokenizer.encode(" five"))  # computed before the engine heard of it
    lane = client.stream.lane
    until(lambda: lane is not None and lane.num_streams == 0)  # the poller has seen it
    assert client.channel.finals == 1
    for number in range(2 * NUM_LANES):  # what came too late has not ended the lane
        other = Client(pool, engine, tokenizer, f"other {number}")
        other.push(*tokenizer.encode("one"), reason=FinishReason.LENGTH)
        assert other.result() == ["one"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RequestError("top_k must be ..."), ErrorCode.INVALID_ARG, "Error generating stream: top_k must be ..."),
        (EngineDeadError("it died"), ErrorCode.UNAVAILABLE, "Error generating stream: it died"),
        (OverloadedError("it is full"), ErrorCode.UNAVAILABLE, "Error generating stream: it is full"),
        (DeadlineError("too late"), ErrorCode.UNAVAILABLE, "Error generating stream: too late"),
        (NonFiniteLogitsError("not finite"), ErrorCode.INTERNAL, "Error generating stream: not finite"),
        (ZeroDivisionError("/secret"), ErrorCode.INTERNAL, "internal error (ZeroDivisionError), see the server's log"),
    ],
)
def test_errors(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer, error: Exception, code: ErrorCode, message: str
) -> None:
    client = Client(pool, engine, tokenizer, "a")
    client.push(*tokenizer.encode("one"))
    client.push(reason=FinishReason.ERROR, error=error)
    client.push(reason=FinishReason.ERROR, error=error)
    first, last = client.result()
    assert first == "one"
    assert last[0] is code
    assert message in last[1]
    assert "/secret" not in last[1]


def test_a_refused_request_is_answered_once_and_not_asked_afterwards(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer
) -> None:
    clients = [Client(pool, engine, tokenizer, f"r{number}") for number in range(50)]
    for client in clients:
        time.sleep(0.002)  # the poller goes over all of them meanwhile
        pool.discard(client.stream)
        client.stream.refuse(RequestError("too long"))
    for client in clients:
        assert client.result() == [(ErrorCode.INVALID_ARG, "Error generating stream: too long")]
        assert not client.stream.is_cancelled()
        assert client.channel.finals == 1


@pytest.mark.parametrize("running", [True, False])
def test_cancellation_reaches_the_engine_and_the_client(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer, running: bool
) -> None:
    client = Client(pool, engine, tokenizer, "a")
    if running:
        client.push(*tokenizer.encode("one"))
    client.channel.cancelled = True
    assert client.result()[-1] == (ErrorCode.CANCELLED, "Request was cancelled")
    assert engine.aborted[0] == "a"


def test_a_client_that_cannot_be_asked_for_is_logged_once(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked for every 20 ms, and gets its answer all the same."""
    clients = [Client(pool, engine, tokenizer, name) for name in ("a", "b")]
    for client in clients:
        client.channel.asking_fails_with = OSError("no space left in shared memory")
    until(lambda: all(client.channel.num_asked > 5 for client in clients))
    for client in clients:
        client.push(*tokenizer.encode("one"), reason=FinishReason.LENGTH)
        assert client.result() == ["one"]
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"request {client.name}: cannot tell whether it was cancelled" for client in clients
    ]


def test_a_failed_send_ends_its_request_only(pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer) -> None:
    clients = [Client(pool, engine, tokenizer, f"{i}") for i in range(5)]
    broken = clients[0]
    broken.channel.fails_with = OSError("no space left in shared memory")
    for client in clients:
        client.push(*tokenizer.encode("one"))
        client.push(*tokenizer.encode(" two"), reason=FinishReason.LENGTH)
    (answer,) = broken.result()
    assert answer[0] is ErrorCode.INTERNAL
    until(lambda: "0" in engine.aborted)
    for client in clients[1:]:
        assert "".join(map(str, client.result())) == "one two"


def test_stopping_the_pool_sends_what_was_pushed(engine: RecordingEngine, tokenizer: Tokenizer) -> None:
    pool = SenderPool(engine)
    clients = [Client(pool, engine, tokenizer, f"{i}") for i in range(20)]
    for client in clients:
        client.push(*tokenizer.encode("one"))
        client.push(reason=FinishReason.ERROR, error=EngineDeadError("stopped"))
    clients[0].channel.gate.clear()
    pool.start()
    assert clients[0].channel.blocked.wait(WAIT)
    threading.Timer(0.1, clients[0].channel.gate.set).start()
    pool.stop(WAIT)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pagedcore-")]
    assert all(client.channel.finals == 1 for client in clients)


def test_a_token_that_comes_while_its_stream_leaves_the_line_is_sent(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is pushed just after the lane has found nothing pending; nothing comes after it that could take it along."""
    first, second = tokenizer.encode("one two")
    client = Client(pool, engine, tokenizer, "a")
    has_response = client.stream._has_response
    pushers: list[threading.Thread] = []

    def found_nothing_and_then_one_comes() -> bool:
        found = has_response()
        if not found and client.stream.started and not pushers:
            pushers.append(threading.Thread(target=client.push, args=(second,)))
            pushers[0].start()
            pushers[0].join(0.2)  # where it waits for the lane, it goes on waiting
        return found

    monkeypatch.setattr(client.stream, "_has_response", found_nothing_and_then_one_comes)
    client.push(first)
    until(lambda: len(client.channel.sent) == 2)
    pushers[0].join(WAIT)
    client.push(reason=FinishReason.LENGTH)
    assert client.result() == [*map(tokenizer.token_text, (first, second)), ""]
