"""A model's chat template: it turns a conversation into a prompt, in a sandbox with limits on time and size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError

from pagedcore.errors import RequestError, shown
from pagedcore.template_sandbox import CHECK_TIME, MAX_CHARACTERS, make_environment

MAX_SECONDS = 1.0
MAX_MESSAGES = 4096
MAX_ERROR_CHARACTERS = 400  # of what a template says that is wrong


class ChatTemplate:
    """A template from a model folder. It sees the messages and the special tokens, and can change or reach nothing else."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: by the names that templates use, such as bos_token. Raises RequestError for a broken template."""
        self._special_tokens = special_tokens
        try:
            self._template = make_environment().from_string(source)
        except Exception as error:  # also of Python's compiler, which has limits of its own
            raise RequestError(f"messages cannot be used: the model's chat template is broken: {error}") from error

    def render(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> str:
        """The prompt, to be encoded without more special tokens.

        Raises:
            RequestError: the messages are none, or the template refuses them, or takes more than its time or size.
        """
        check_messages(messages)
        variables = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            CHECK_TIME: _time_check(time.monotonic() + MAX_SECONDS),
            **self._special_tokens,
        }
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise SecurityError(f"the prompt has more than {MAX_CHARACTERS} characters")
        except Exception as error:  # whatever a template raises, it is about these messages
            reason = ascii(str(error))[1:-1][:MAX_ERROR_CHARACTERS]  # it may quote the messages
            raise RequestError(f"messages do not fit the model's chat template: {reason}") from error
        return "".join(pieces)


def check_messages(messages: Sequence[Any]) -> None:
    """Raise RequestError unless these are messages of text: objects with a role and, mostly, content."""
    if not messages:
        raise RequestError("messages must hold at least 1 message, got none")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages must hold at most {MAX_MESSAGES} messages, got {len(messages)}")
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"{name} must be an object with a text as role, got {shown(message)}")
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise RequestError(f'{name}.content must have parts of type "text" only, got {shown(part)}')
        elif content is not None and not isinstance(content, str):
            raise RequestError(f"{name}.content must be a text or a list of parts, got {shown(content)}")


def _time_check(deadline: float) -> Callable[[], None]:
    def check() -> None:
        if time.monotonic() > deadline:
            raise SecurityError(f"it takes longer than {MAX_SECONDS:g} s")

    return check
