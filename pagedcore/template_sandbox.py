"""The environment that chat templates are rendered in: jinja2's immutable sandbox, with limits on what can be multiplied.

A result that cannot be larger than its inputs together needs no check: of these, each is made of texts within the limit. What can
be larger (padding, repeating, replacing, joining, formatting, JSON) is measured before it is made, or is not there.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Callable, ItemsView, Iterable, KeysView, Sequence, ValuesView
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_eval_context
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 1 << 20  # of the prompt, and of any one text or list that a template makes
CHECK_TIME = "__check_time__"  # a variable that the renderer gives: called in every round of a loop and in every macro
_CONCATENATE = "__concatenate__"
_MAX_INTEGER_BITS = 4096
_MAX_PATTERN_CHARACTERS = 256  # of strftime, whose fields can have a width
_OTHER_CHARACTERS = 64  # what is reckoned for the text of anything that is neither text, number nor container
# Not needed for a prompt, and without a limit on what they make.
_LEFT_OUT_FILTERS = ("batch", "center", "pprint", "round", "slice", "sum", "urlize", "wordwrap", "xmlattr")
_LEFT_OUT_METHODS = frozenset(("center", "encode", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill"))
# They turn anything into text first.
_TEXT_FILTERS = (
    *("capitalize", "e", "escape", "forceescape", "lower", "safe", "string", "striptags", "title", "trim"),
    *("truncate", "upper", "urlencode", "wordcount"),
)
_CONTAINERS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_PRINTF = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?")


def make_environment() -> jinja2.Environment:
    """An environment with what transformers gives to chat templates: tojson, raise_exception, strftime_now, generation."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    for name in _LEFT_OUT_FILTERS:
        del environment.filters[name]
    for name in _TEXT_FILTERS:
        environment.filters[name] = _measured(environment.filters[name])
    environment.filters.update(tojson=_to_json, join=_join, replace=_replace, indent=_indent, format=_format)
    del environment.globals["lipsum"]
    environment.globals[_CONCATENATE] = _concatenate
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Environment(ImmutableSandboxedEnvironment):
    """Checks the time in every round of a loop and every call of a macro, and the size of what can grow."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_checked, **options)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Makes the text of a macro, of a block that is set or filtered."""
        pieces = list(pieces)
        _check(sum(map(len, pieces)))
        return "".join(pieces)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        bodies = [(node.lineno, node.body) for node in template.find_all(nodes.For)]
        bodies += [(node.lineno, node.body) for node in template.find_all(nodes.Macro)]
        for line, body in bodies:
            call = nodes.Call(nodes.Name(CHECK_TIME, "load"), [], [], None, None)
            body.insert(0, nodes.ExprStmt(call, lineno=line))
        _ConcatToCall().visit(template)
        template.set_environment(self)
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        left_out = isinstance(obj, (str, int)) and attr in _LEFT_OUT_METHODS
        return not left_out and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sequences = (str, list, tuple)
        if operator == "%":
            return _printf(left, right) if isinstance(left, str) else super().call_binop(context, operator, left, right)
        if operator == "+" and isinstance(left, sequences) and isinstance(right, sequences):
            _check(len(left) + len(right))
        for value, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, sequences) and isinstance(other, int):
                _check(len(value) * other)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            if bits > _MAX_INTEGER_BITS:
                raise SecurityError(f"a number has more than {_MAX_INTEGER_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            args = (list(args[0]),)
            _check(len(owner) * len(args[0]) + _size(args[0]))
        elif isinstance(owner, str) and name == "replace" and len(args) >= 2:
            _check_replaced(owner, args[0], args[1])
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, (*args, kwargs))
            return wrapped(*args, **kwargs)

        return measured


class _ConcatToCall(NodeTransformer):
    """Makes `a ~ b` a call of a function that measures first."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return nodes.Call(nodes.Name(_CONCATENATE, "load"), node.nodes, [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant has said, for training; a prompt has its content and nothing more."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check(num_characters: int) -> None:
    if num_characters > MAX_CHARACTERS:
        raise SecurityError(f"a text or list has more than {MAX_CHARACTERS} characters or elements")


def _size(value: Any, per_element: int = 4, indent: int = 0) -> int:
    """At least the characters of `value` as text, where an element costs `per_element` and a line `indent` for each level.

    A list that holds another one twice counts it twice, as its text would. Raises SecurityError above MAX_CHARACTERS.
    """
    total = 0
    stack = [(value, 1)]
    while stack:
        item, level = stack.pop()
        total += per_element + indent * level
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            stack.extend((part, level + 1) for pair in item.items() for part in pair)
        elif isinstance(item, _CONTAINERS):
            stack.extend((part, level + 1) for part in item)
        elif isinstance(item, Namespace):
            raise SecurityError("a namespace must not be made a text")
        else:
            total += item.bit_length() // 3 if isinstance(item, int) else _OTHER_CHARACTERS
        _check(total + len(stack))
    return total


def _checked(value: Any) -> Any:
    """What is to become text, whose parts are measured."""
    if isinstance(value, (dict, Namespace, *_CONTAINERS)):
        _size(value)
    return value


def _measured(text_filter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(text_filter)
    def measured(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            _checked(value)
        return text_filter(*args, **kwargs)

    return measured


def _concatenate(*values: Any) -> str:
    _check(sum(len(value) if isinstance(value, str) else _size(value) for value in values))
    return "".join(map(str, values))


@pass_eval_context
def _join(context: nodes.EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(value if attribute is None else map(make_attrgetter(context.environment, attribute), value))
    _check(len(items) * len(str(d)) + _size(items, per_element=0))
    joined: str = FILTERS["join"](context, items, d)
    return joined


@pass_eval_context
def _replace(context: nodes.EvalContext, s: Any, old: str, new: str, count: int | None = None) -> str:
    _checked(s)
    _check_replaced(str(s), old, new)
    replaced: str = FILTERS["replace"](context, s, old, new, count)
    return replaced


def _check_replaced(text: str, old: Any, new: Any) -> None:
    _check(len(text) + text.count(str(old)) * len(str(new)))


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = width if isinstance(width, int) else len(width)
    _check(len(s) + (len(s.splitlines()) + 1) * size)
    indented: str = FILTERS["indent"](s, width, first, blank)
    return indented


def _printf(text: str, values: Any) -> str:
    fields = _PRINTF.findall(text)
    if any("*" in field for field in fields):
        raise SecurityError("a format must not take its width from a value")
    _check(len(text) + sum(int(number) for field in fields for number in field if number) + len(fields) * _size(values))
    return str(text % values)


def _format(text: str, *values: Any, **named_values: Any) -> str:
    return _printf(text, named_values or values)


def _check_format(text: str, values: Sequence[Any]) -> None:
    size = len(text)
    argument_size = _size(values)
    for _, field, spec, _ in string.Formatter().parse(text):
        if field is None:
            continue
        if "{" in (spec or ""):
            raise SecurityError("a format must not take its width from a value")
        size += argument_size + sum(map(int, re.findall(r"\d+", spec or "")))
    _check(size)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    width = len(indent) if isinstance(indent, str) else indent or 0
    _size(value, 4 + sum(map(len, separators or ())), max(width, 0))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _MAX_PATTERN_CHARACTERS:
        raise SecurityError(f"a date's pattern has more than {_MAX_PATTERN_CHARACTERS} characters")
    return datetime.now().strftime(pattern)


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
