"""Text to tokens and back: a tokenizer, and how it is loaded."""

from __future__ import annotations

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
            if token is None:
                return b""  # not remembered: there is no end of such ids
            data = self._token_bytes[token_id] = self._to_bytes(token)
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
