"""What stands for Triton and the engine around the response streams, and clients that push tokens into them."""

from __future__ import annotations

import threading
import time

from pagedcore_triton.protocol import OutputDelta, SequenceDelta
from pagedcore_triton.responses import ErrorCode, ResponseStream
from pagedcore_triton.senders import NUM_LANES, SenderPool
from pagedcore_triton.sequence_output import SequenceOutput

from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import FinishReason
from pagedcore.output_text import OutputText, PromptEnd
from pagedcore.text import Tokenizer

WAIT = 10.0


class RecordingChannel:
    """Stands for Triton's response sender, which exists only in its stub. A closed `gate` makes a send block."""

    def __init__(self, log: list[tuple[RecordingChannel, str]] | None = None) -> None:
        self.sent: list[str | tuple[ErrorCode, str]] = []  # of a text response, the texts joined by |
        self.deltas: list[list[SequenceDelta]] = []
        self.finals = 0
        self.done = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.blocked = threading.Event()
        self.cancelled = False
        self.fails_with: Exception | None = None
        self.asking_fails_with: Exception | None = None
        self.num_asked = 0
        self.misused: list[str] = []
        self._log = log

    def send(self, delta: OutputDelta, final: bool) -> None:
        self.deltas.append(list(delta.sequences))
        self._record("|".join(sequence.text for sequence in delta.sequences), final)

    def send_error(self, code: ErrorCode, message: str) -> None:
        self._record((code, message), True)

    def is_cancelled(self) -> bool:
        if self.finals:
            self.misused.append("asked after the final response")
        self.num_asked += 1
        if self.asking_fails_with is not None:
            raise self.asking_fails_with
        return self.cancelled

    def _record(self, what: str | tuple[ErrorCode, str], final: bool) -> None:
        if self.finals:
            self.misused.append(f"{what} after the final response")
        self.blocked.set()
        assert self.gate.wait(WAIT)
        if self.fails_with is not None and isinstance(what, str):
            raise self.fails_with
        self.sent.append(what)
        if self._log is not None and isinstance(what, str):
            self._log.append((self, what))
        self.finals += final
        if final:
            self.done.set()


class RecordingEngine:
    """Stands for the engine: an abort is answered with a final output, once, as the engine does."""

    def __init__(self) -> None:
        self.streams: dict[str, ResponseStream] = {}
        self.channels: list[RecordingChannel] = []
        self.aborted: list[str] = []
        self.ended: list[tuple[str, int]] = []

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if stream := self.streams.pop(request_id, None):
            stream.push(TokenOutput(request_id, 0, [], FinishReason.ABORT))

    def end_sequence(self, request_id: str, index: int) -> None:
        self.ended.append((request_id, index))
        self.streams[request_id].push(TokenOutput(request_id, index, [], FinishReason.STOP))


class Client:
    """A request that is registered with pool and engine, and its tokens."""

    def __init__(
        self,
        pool: SenderPool,
        engine: RecordingEngine,
        tokenizer: Tokenizer,
        name: str,
        *,
        stream: bool = True,
        prefix: str = "",
        num_sequences: int = 1,
        log: list[tuple[RecordingChannel, str]] | None = None,
        **params: object,
    ) -> None:
        self.name = name
        self.channel = RecordingChannel(log)
        sampling = SamplingParams.from_dict(params)
        sequences = [
            SequenceOutput(tokenizer, OutputText(tokenizer, PromptEnd(), stop=sampling.stop or ()), prefix=prefix)
            for _ in range(num_sequences)
        ]
        self.stream = ResponseStream(
            name, self.channel, sequences, stream=stream, has_stop_strings=bool(sampling.stop), num_input_tokens=3
        )
        pool.add(self.stream)
        engine.streams[name] = self.stream
        engine.channels.append(self.channel)

    def push(
        self, *token_ids: int, index: int = 0, reason: FinishReason | None = None, error: Exception | None = None
    ) -> None:
        self.stream.push(TokenOutput(self.name, index, list(token_ids), reason, error=error))

    def result(self) -> list[str | tuple[ErrorCode, str]]:
        assert self.channel.done.wait(WAIT)
        return self.channel.sent


def three_of_one_lane(
    pool: SenderPool, engine: RecordingEngine, tokenizer: Tokenizer, log: list[tuple[RecordingChannel, str]]
) -> list[Client]:
    """Clients that share a lane, all lanes having three."""
    clients = [Client(pool, engine, tokenizer, f"{i}", log=log) for i in range(3 * NUM_LANES)]
    return [client for client in clients if client.stream.lane is clients[0].stream.lane]


def until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
