"""Text to tokens and back: tokenizer loading, incremental detokenization, stop strings."""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from pagedcore.chat_template import ChatTemplate
from pagedcore.errors import ConfigError, RequestError

_logger = logging.getLogger(__name__)

_SPACE_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_INCOMPLETE_BYTES = 3  # of a UTF-8 character


class Tokenizer:
    """A Hugging Face tokenizer without the transformers package (whose import loads torch).

    Encodes and decodes as `transformers.AutoTokenizer` does for the same folder. Safe to use from several threads.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], chat_template: str | None) -> None:
        """`backend` is a `tokenizers.Tokenizer`, `config` the content of tokenizer_config.json.

        Raises:
            ConfigError: the tokenizer's decoder is not one of byte-level, byte-fallback or Metaspace.
        """
        self._backend = backend
        self._chat_template, self._chat_template_error = _compile_template(config, chat_template)
        self._byte_level = _uses_byte_level(backend)
        self._strips_first_space = not self._byte_level and backend.decode([_probe_token(backend)]) == ""
        self._token_bytes: dict[int, bytes] = {}
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        eos_token = token_content(config, "eos_token")
        self.eos_token_id: int | None = None if eos_token is None else backend.token_to_id(eos_token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model's tokenizer adds (a BOS token, mostly)."""
        # Unlike encode(), the batch call lets other threads run: a megabyte of text takes half a second.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that encoding `text` cannot stay below; looks at no more than its length."""
        if self._longest_token_bytes is None:
            return 0
        return -(-len(text.encode().translate(None, self._bytes_without_token)) // self._longest_token_bytes)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence of tokens."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """The text of one token inside a text; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def bad_word_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The token ids by which `words` are recognized in an output: at the start of a text and, where a space before the
        word changes its first token only, after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            at_start, after_space = (
                tuple(self.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " ")
            )
            found[at_start] = None
            if len(after_space) == len(at_start) and after_space[0] != at_start[0]:
                found[after_space] = None
        return tuple(found)

    def is_special(self, token_id: int) -> bool:
        """True for control tokens such as the end-of-sequence token."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for; none for ids without a token, as models pad their vocabulary."""
        data = self._token_bytes.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id)
            data = b"" if token is None else self._to_bytes(token)
            self._token_bytes[token_id] = data
        return data

    def strips_space_after(self, prompt_token_ids: Iterable[int]) -> bool:
        """True if decoding drops the leading space of what follows this prompt: at the start of a text, some do."""
        return self._strips_first_space and all(token_id in self._special_ids for token_id in prompt_token_ids)

    def apply_chat_template(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> str:
        """Render the model's chat template to the text to encode with `add_special_tokens=False`.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages; see `ChatTemplate.render`.
        """
        if self._chat_template is None:
            raise RequestError(self._chat_template_error)
        return self._chat_template.render(messages, add_generation_prompt)

    @cached_property
    def _longest_token_bytes(self) -> int | None:
        """Of the text that one token can stand for; None where that may have no limit: a normalizer can shorten the text, an
        unknown token stand for any number of characters, and an added one take in the spaces beside it."""
        added = self._backend.get_added_tokens_decoder().values()
        takes_spaces = any(token.lstrip or token.rstrip for token in added)
        if not self._byte_level or takes_spaces or self._backend.normalizer is not None:
            return None
        return max(len(self._to_bytes(token)) for token in self._backend.get_vocab(with_added_tokens=True))

    @cached_property
    def _bytes_without_token(self) -> bytes:
        """Those that a byte-level tokenizer leaves out of what it encodes."""
        return bytes(b for text, b in _BYTE_LEVEL_ALPHABET.items() if self._backend.token_to_id(text) is None)

    def _to_bytes(self, token: str) -> bytes:
        if self._byte_level:
            data = [_BYTE_LEVEL_ALPHABET.get(character, -1) for character in token]
            return token.encode() if -1 in data else bytes(data)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace(_SPACE_MARK, " ").encode()


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text as they come, in whole characters only.

    The pieces add up to what decoding prompt and output together shows after the prompt. Bytes that form no valid UTF-8
    become U+FFFD. A character that begins in the prompt and ends in the output belongs to the output.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_space_after(prompt_token_ids)
        self._decoder.decode(self._tail_bytes(prompt_token_ids))

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

    def _tail_bytes(self, prompt_token_ids: Sequence[int]) -> bytes:
        """Enough of the prompt's end to know whether a character is unfinished there."""
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if not (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
                tail = self._tokenizer.token_bytes(token_id) + tail
            if len(tail) > _MAX_INCOMPLETE_BYTES:
                break
        return tail


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
        prompt_token_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """Stop strings count only in text that comes after the first `min_tokens` tokens."""
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids, skip_special_tokens)
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


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder, from its tokenizer.json.

    Raises:
        ConfigError: a file is missing or cannot be read; the text names it.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist; transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...) makes one"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"{path} is not a tokenizer: {error}") from error
    config = _read_json(folder / "tokenizer_config.json")
    backend.no_truncation()
    backend.no_padding()
    _add_special_tokens(backend, config)
    return Tokenizer(backend, config, _read_chat_template(folder, config))


def token_content(config: Mapping[str, Any], name: str) -> str | None:
    """A special token of tokenizer_config.json, which holds them as text or as an object with their content.

    Raises ConfigError where it is neither.
    """
    token = config.get(name)
    content = token.get("content", token) if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise ConfigError(
            f'tokenizer_config.json: {name} must be a text, an object with a "content" or null, got {token!r}'
        )
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template", entry) for entry in entries if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ConfigError(
            f"tokenizer_config.json: chat_template must be a text or a list of named ones, got {type(template).__name__}"
        )
    return template


def _add_special_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Special tokens that only tokenizer_config.json knows."""
    added = config.get("added_tokens_decoder") or {}
    try:
        for token_id in sorted(added, key=int):
            if backend.id_to_token(int(token_id)) is None:
                backend.add_tokens([tokenizers.AddedToken(**added[token_id])])
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"tokenizer_config.json: added_tokens_decoder must be an object of tokens by id: {error}"
        ) from error
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    contents = [content for name in names if (content := token_content(config, name)) is not None]
    backend.add_special_tokens(contents)


def _uses_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """True for byte-level tokens (GPT-2's alphabet), False for SentencePiece's; anything else raises ConfigError."""
    decoder = json.loads(backend.to_str())["decoder"]
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] if step else "none" for step in steps}
    if kinds == {"ByteLevel"}:
        return True
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return False
    raise ConfigError(
        f"tokenizer.json: the decoder must be byte-level, byte-fallback or Metaspace, got {', '.join(sorted(kinds))}"
    )


def _probe_token(backend: tokenizers.Tokenizer) -> int:
    """The token that is one space, by which a decoder shows whether it drops the first one."""
    token_id: int | None = backend.token_to_id(_SPACE_MARK)
    if token_id is None:
        raise ConfigError("tokenizer.json: the vocabulary has no token for a space")
    return token_id


def _compile_template(config: Mapping[str, Any], source: str | None) -> tuple[ChatTemplate | None, str]:
    """The chat template, or None and why requests cannot use one. A broken one is reported, and the model serves the others."""
    if source is None:
        return None, "messages cannot be used: the model's tokenizer has no chat template"
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    try:
        return ChatTemplate(source, {name: token_content(config, name) or "" for name in names}), ""
    except RequestError as error:
        _logger.warning("%s", error)
        return None, str(error)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stays, the rest is moved above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


_BYTE_LEVEL_ALPHABET = _byte_level_alphabet()
