"""A model's chat template: it turns a conversation into a prompt, in a sandbox with limits on time and size."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagedcore.errors import RequestError, shown

MAX_SECONDS = 1.0
MAX_CHARACTERS = 1 << 20  # of the prompt, and of any text that a template multiplies
MAX_MESSAGES = 4096
MAX_ERROR_CHARACTERS = 400  # of what a template says that is wrong
_MAX_INTEGER_BITS = 4096
_CHECK_TIME = "__check_time__"


class ChatTemplate:
    """A template from a model folder. It sees the messages and the special tokens, and can change or reach nothing else."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: by the names that templates use, such as bos_token. Raises RequestError for a broken template."""
        self._special_tokens = special_tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
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
            _CHECK_TIME: _time_check(time.monotonic() + MAX_SECONDS),
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


class _Environment(ImmutableSandboxedEnvironment):
    """Checks the time in every round of a loop and every call of a macro, and the size of every multiplication."""

    intercepted_binops = frozenset(("*", "**"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        bodies = [(node.lineno, node.body) for node in template.find_all(nodes.For)]
        bodies += [(node.lineno, node.body) for node in template.find_all(nodes.Macro)]
        for line, body in bodies:
            call = nodes.Call(nodes.Name(_CHECK_TIME, "load"), [], [], None, None)
            body.insert(0, nodes.ExprStmt(call, lineno=line))
        template.set_environment(self)
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value in (left, right):
            other = right if value is left else left
            if isinstance(value, (str, list, tuple)) and isinstance(other, int) and len(value) * other > MAX_CHARACTERS:
                raise SecurityError(f"a product has more than {MAX_CHARACTERS} elements")
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            if bits > _MAX_INTEGER_BITS:
                raise SecurityError(f"a number has more than {_MAX_INTEGER_BITS} bits")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _time_check(deadline: float) -> Callable[[], None]:
    def check() -> None:
        if time.monotonic() > deadline:
            raise SecurityError(f"it takes longer than {MAX_SECONDS:g} s")

    return check


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
