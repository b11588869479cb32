"""A model whose engine only makes up tokens, to measure what asking for cancelled requests takes; see cancellation.py."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from pagedcore_triton import model as served
from pagedcore_triton.protocol import OUTPUTS
from pagedcore_triton.responses import ResponseStream
from pagedcore_triton.senders import SenderPool
from pagedcore_triton.sequence_output import SequenceOutput

from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.sequence import FinishReason
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.text import load_tokenizer

TOKEN_SECONDS = 0.2  # a token for every stream in this time


class UnaskedChannel(served.TritonChannel):
    """Does not ask Triton whether its client has gone."""

    def is_cancelled(self) -> bool:
        return False


class TokenSource:
    """Pushes a token to every open stream from time to time, and writes down when one is aborted."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("a", buffering=1, encoding="utf-8")
        self._streams: dict[str, ResponseStream] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, stream: ResponseStream) -> None:
        self._streams[stream.request_id] = stream

    def abort(self, request_id: str) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._log.write(f"{request_id} {time.monotonic()}\n")
            stream.push(TokenOutput(request_id, 0, [], FinishReason.ABORT, request_finished=True))

    def end_sequence(self, request_id: str, index: int) -> None:
        """No stop strings here."""

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(TOKEN_SECONDS):
            for stream in list(self._streams.values()):
                stream.push(TokenOutput(stream.request_id, 0, [17]))


class TritonPythonModel(served.TritonPythonModel):
    """The channels, response streams, senders and poller of the real one."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self._asks = json.loads((folder / "model.json").read_text(encoding="utf-8"))["asks"]
        self._tokenizer = load_tokenizer(ensure_default_model())
        self._source = TokenSource(folder / "aborted.log")
        self._senders = SenderPool(self._source)
        self._senders.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            channel = (served.TritonChannel if self._asks else UnaskedChannel)(
                request.get_response_sender(), OUTPUTS[:1]
            )
            sequences = [SequenceOutput(self._tokenizer, None)]
            stream = ResponseStream(request.request_id(), channel, sequences, stream=True)
            self._senders.add(stream)
            self._source.add(stream)

    def is_ready(self) -> bool:
        return True

    def finalize(self) -> None:
        self._source.stop()
        self._senders.stop(served.STOP_SECONDS)
