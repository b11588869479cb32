"""Tokens to text as they come: incremental detokenization, stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pagedcore.text import Tokenizer

_MAX_INCOMPLETE_BYTES = 3  # of a UTF-8 character
_MAX_TAIL_TOKENS = 256  # of a prompt: tokens without bytes may stand inside a character, but not any number of them


@dataclass(frozen=True)
class PromptEnd:
    """What of a prompt matters to the text that follows it: the same for all of a request's outputs.

    `tail`: its last bytes, enough to know whether a character is unfinished there. `strips_space`: decoding drops the
    leading space of what follows.
    """

    tail: bytes = b""
    strips_space: bool = False


def prompt_end(tokenizer: Tokenizer, token_ids: Sequence[int], skip_special_tokens: bool = True) -> PromptEnd:
    """The end of a prompt, from its last 256 tokens, and whether it has any text."""
    tail = b""
    for token_id in reversed(token_ids[-_MAX_TAIL_TOKENS:]):
        if not (skip_special_tokens and tokenizer.is_special(token_id)):
            tail = tokenizer.token_bytes(token_id) + tail
        if len(tail) > _MAX_INCOMPLETE_BYTES:
            break
    return PromptEnd(tail, tokenizer.strips_space_after(token_ids))


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text as they come, in whole characters only.

    The pieces add up to what decoding prompt and output together shows after the prompt. Bytes that form no valid UTF-8
    become U+FFFD. A character that begins in the prompt and ends in the output belongs to the output.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: PromptEnd, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = prompt.strips_space
        self._decoder.decode(prompt.tail)

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; an unfinished character is held back."""
        return self._decoder.decode(b"".join(map(self._bytes, token_ids)))

    def flush(self) -> str:
        """What is held back, as U+FFFD. Call it once, after the last token."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return b""
        data = self._tokenizer.token_bytes(token_id)
        if self._strip_space and data:
            self._strip_space = False
            return data.removeprefix(b" ")
        return data


class StopStrings:
    """Ends a text at the stop string that is complete first, wherever the text is cut into pieces.

    Text that may be the beginning of a stop string is held back, so none of a stop string is ever shown.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        """`stop` holds no empty strings; with `include_stop_str_in_output` the matched one ends the text."""
        assert all(stop), "empty stop string"
        self._stop = tuple(stop)
        self._include = include_stop_str_in_output
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string that ended it (then nothing more is to be pushed)."""
        if not self._stop:
            return text, None
        text = self._held + text
        match = min(
            ((start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0), default=None
        )
        if match is not None:
            end, start, stop = match
            self._held = ""
            return text[: end if self._include else start], stop
        keep = self._held_back(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What is held back, now that the text has ended without a stop string."""
        text, self._held = self._held, ""
        return text

    def _held_back(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stop:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and len(text) - start > longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                start = text.find(stop[0], start + 1)
        return longest


class OutputText:
    """The text of one output sequence: detokenized in whole characters and ended by the first stop string.

    `stopped_by` is that stop string once it is found, and `num_tokens` counts the tokens up to the one that completed
    it; later tokens are dropped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: PromptEnd,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """Stop strings count only in text that comes after the first `min_tokens` tokens."""
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens)
        self._stop_strings = StopStrings(stop, include_stop_str_in_output)
        self._min_tokens = min_tokens if stop else 0
        self._token_by_token = bool(stop)
        self.stopped_by: str | None = None
        self.num_tokens = 0

    def push(self, token_ids: Sequence[int], *, final: bool = False, hide_last: bool = False) -> str:
        """The text that may be shown now.

        `final` says that these are the sequence's last tokens, `hide_last` that the last of them has no text of its own
        (a stop token).
        """
        text = ""
        assert token_ids or not hide_last
        shown = len(token_ids) - hide_last
        pieces = [token_ids[i : i + 1] for i in range(shown)] if self._token_by_token else [token_ids[:shown]]
        for piece in pieces:
            if self.stopped_by is not None:
                return text
            self.num_tokens += len(piece)
            text += self._check(self._detokenizer.push(piece))
        if hide_last and self.stopped_by is None:
            self.num_tokens += 1
        if final and self.stopped_by is None:
            text += self._check(self._detokenizer.flush()) + self._stop_strings.flush()
        return text

    def _check(self, text: str) -> str:
        if self.num_tokens <= self._min_tokens and self._min_tokens:
            return text
        shown, self.stopped_by = self._stop_strings.push(text)
        return shown
