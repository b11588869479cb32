"""One output sequence of a request, and its prompt: from tokens to what the responses tell."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from pagedcore.engine.logprobs import PromptLogprobs, TokenLogprobs
from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.sequence import FinishReason
from pagedcore.output_text import OutputText
from pagedcore.text import Tokenizer
from pagedcore_triton.protocol import SequenceDelta


class SequenceOutput:
    """Collects what a sequence has to tell until a response takes it.

    Ends with the engine's finish reason or, before that, with a stop string; what comes after it is dropped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text: OutputText | None,
        *,
        prefix: str = "",
        hides_stop_token: bool = True,
        wants_logprobs: bool = False,
    ) -> None:
        """`text` is None where no text is wanted. `prefix` goes before the first text.

        `hides_stop_token`: the token that made the engine stop has no text. `wants_logprobs`: the outputs have log
        probabilities, and the client wants to see them.
        """
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._text = text
        self._hides_stop_token = hides_stop_token
        self._wants_logprobs = wants_logprobs
        self._new_text = prefix
        self._new_token_ids: list[int] = []
        self._new_logprobs: list[TokenLogprobs] = []
        self._cumulative_logprob = 0.0

    def take(self, outputs: Iterable[TokenOutput]) -> bool:
        """Add the engine's next outputs of this sequence; returns whether a stop string has ended it before the engine."""
        if self.finish_reason is not None:
            return False
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        reason: FinishReason | None = None
        total: float | None = None
        for output in outputs:
            token_ids += output.token_ids
            logprobs += output.logprobs or ()
            reason, total = output.finish_reason, output.cumulative_logprob
        ended_by_engine, count = reason is not None, len(token_ids)
        if self._text is not None:
            hide_last = reason is FinishReason.STOP and self._hides_stop_token and count > 0
            before = self._text.num_tokens
            self._new_text += self._text.push(token_ids, final=ended_by_engine, hide_last=hide_last)
            if self._text.stopped_by is not None:
                reason, count, total = FinishReason.STOP, self._text.num_tokens - before, None
        self._new_token_ids += token_ids[:count]
        self._cumulative_logprob += sum(entry.logprob for entry in logprobs[:count])
        if total is not None:
            self._cumulative_logprob = total
        if self._wants_logprobs:
            self._new_logprobs += logprobs[:count]
        self.finish_reason = reason
        return reason is not None and not ended_by_engine

    def delta(self) -> SequenceDelta:
        """What is new since the last call."""
        delta = SequenceDelta(
            self._new_text,
            self.finish_reason,
            self._new_token_ids,
            self._cumulative_logprob,
            self._logprobs_json() if self._wants_logprobs else "null",
        )
        self._new_text, self._new_token_ids, self._new_logprobs = "", [], []
        return delta

    def _logprobs_json(self) -> str:
        tokenizer = None if self._text is None else self._tokenizer
        entries = zip(self._new_token_ids, self._new_logprobs, strict=True)
        return _json_list(_position_json(token_id, entry, tokenizer) for token_id, entry in entries)


class PromptOutput:
    """What the first response tells of a prompt whose log probabilities were asked for.

    `take` belongs to the engine thread, `logprobs_json` to the thread that sends.
    """

    def __init__(self, token_ids: Sequence[int], tokenizer: Tokenizer | None) -> None:
        """`tokenizer`: None where tokens are to be told without their texts."""
        self._token_ids = token_ids
        self._tokenizer = tokenizer
        self._logprobs: PromptLogprobs | None = None

    def take(self, logprobs: PromptLogprobs) -> None:
        """Keep what the engine has found; returns at once."""
        self._logprobs = logprobs

    def logprobs_json(self) -> str:
        """What was taken, the first time; else null."""
        taken, self._logprobs = self._logprobs, None
        if taken is None:
            return "null"
        entries = zip(self._token_ids[1:], taken.positions(), strict=True)
        return _json_list(["null", *(_position_json(token_id, entry, self._tokenizer) for token_id, entry in entries)])


def _json_list(items: Iterable[str]) -> str:
    return f"[{', '.join(items)}]"


def _position_json(token_id: int, entry: TokenLogprobs, tokenizer: Tokenizer | None) -> str:
    """An object: the token that is there first, then the most likely ones, each under its id.

    Positions are encoded one by one, as the encoder would let no other thread run during a long prompt.
    """

    def fields(token_id: int, logprob: float, rank: int) -> dict[str, float | int | str | None]:
        decoded = None if tokenizer is None else tokenizer.token_text(token_id)
        return {"logprob": logprob, "rank": rank, "decoded_token": decoded}

    position = {token_id: fields(token_id, entry.logprob, entry.rank)}
    for rank, (other, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs, strict=True), 1):
        if other >= 0:  # fewer tokens have a finite probability than were asked for
            position.setdefault(other, fields(other, logprob, rank))
    return json.dumps(position)
