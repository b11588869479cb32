"""Chat templates cannot reach out of their sandbox, nor take more than their time and size."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from pagedcore import chat_template
from pagedcore.chat_template import ChatTemplate
from pagedcore.errors import RequestError

# Straight-line code that makes a small list whose text is long: each level holds the one before it twice.
_DOUBLED_LIST = "{% set a = [1] %}" + "{% set a = [a, a] %}" * 24
MESSAGES = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[Any] | None = None) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES if messages is None else messages)


def test_a_template_sees_messages_and_special_tokens() -> None:
    source = "{% macro m(x) %}[{{ x.role }}]{% endmacro %}{{ bos_token }}{% for x in messages %}{{ m(x) ~ x.content }}{% endfor %}"
    assert render(source) == "<s>[user]Hi"
    assert render(
        "{{ '%s-%03d' % ('a', 7) }}{{ '{:>3}'.format(1) }}{{ [1, 2]|join(', ') }}{{ 'aa'.replace('a', 'b') }}"
    ) == ("a-007  11, 2bb")
    assert render("{{ messages|tojson(indent=2) }}") == json.dumps(MESSAGES, indent=2)
    assert render("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 'a' if add_generation_prompt }}") == "---1024a"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__'"),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "division"),
        ("{% include 'other' %}", "no loader"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 10000000 }}", "a text or list has more than 1048576"),
        ("{{ 10000000 * ['x'] }}", "a text or list has more than 1048576"),
        ("{{ 9 ** (9 ** 9) }}", "more than 4096 bits"),
        ("{{ '%300000000d' % 5 }}", "a text or list has more than 1048576"),
        ("{{ '%*d' % (300000000, 5) }}", "must not take its width from a value"),
        ("{{ '%(a)s' * 9999 % {'a': 'x' * 999} }}", "a text or list has more than 1048576"),
        ("{{ '%9999999s'|format('x') }}", "a text or list has more than 1048576"),
        ("{{ '{:300000000}'.format(5) }}", "a text or list has more than 1048576"),
        ("{{ '{:{}}'.format(5, 300000000) }}", "must not take its width from a value"),
        ("{{ 'x'.ljust(300000000) }}", "access to attribute 'ljust'"),
        ("{{ 'x'.zfill(300000000) }}", "access to attribute 'zfill'"),
        ("{{ (1).to_bytes(300000000) }}", "access to attribute 'to_bytes'"),
        ("{{ ('a' * 1000000)|replace('a', 'a' * 300) }}", "a text or list has more than 1048576"),
        ("{{ ('a' * 1000000).replace('', 'a' * 300) }}", "a text or list has more than 1048576"),
        ("{{ (['a' * 1000000] * 300)|join }}", "a text or list has more than 1048576"),
        ("{{ ('a' * 1000000).join('a' * 300) }}", "a text or list has more than 1048576"),
        ("{{ ('a\n' * 1000)|indent(300000) }}", "a text or list has more than 1048576"),
        ("{{ messages|tojson(indent=100000000) }}", "a text or list has more than 1048576"),
        ("{% set a = 'x' * 999999 %}{{ (a ~ a)|length }}", "a text or list has more than 1048576"),
        ("{% set a = 'x' * 999999 %}{{ (a + a)|length }}", "a text or list has more than 1048576"),
        ("{% set a = 'x' * 999999 %}{% set a %}{{ a }}{{ a }}{% endset %}", "a text or list has more than 1048576"),
        (
            "{% set a = 'x' * 999999 %}{% macro m() %}{{ a }}{{ a }}{% endmacro %}{{ m()|length }}",
            "a text or list has more than 1048576",
        ),
        ("{{ strftime_now('%Y' * 999) }}", "a date's pattern has more than 256 characters"),
        ("{{ namespace(a=1) }}", "a namespace must not be made a text"),
        *(
            (f"{_DOUBLED_LIST}{{{{ {text} }}}}", "a text or list has more than 1048576")
            for text in ("a", "a|string", "a|tojson", "a ~ ''", "{'b': a}.values()")
        ),
        ("{% for i in range(99999) %}0123456789ab{% endfor %}", "more than 1048576 characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_what_a_template_must_not_do_fails_its_request(source: str, reason: str) -> None:
    with pytest.raises(RequestError, match=f"messages do not fit the model's chat template: .*({reason})"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    with pytest.raises(RequestError, match=r"it takes longer than 0.2 s"):
        render(source)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages must hold at least 1 message"),
        (["Hi"], r"messages\[0\] must be an object with a text as role, got 'Hi'"),
        ([*MESSAGES, {"content": "Hi"}], r"messages\[1\] must be an object with a text as role"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be a text or a list of parts, got 3"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r'messages\[0\].content must have parts of type "text" only, got .*image_url',
        ),
    ],
)
def test_messages_are_checked(messages: list[Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        render("{{ messages }}", messages)


def test_there_are_not_too_many_messages() -> None:
    with pytest.raises(RequestError, match="messages must hold at most 4096 messages, got 4097"):
        render("{{ messages }}", MESSAGES * 4097)


def test_what_a_template_says_of_the_messages_is_escaped_and_cut() -> None:
    with pytest.raises(RequestError) as raised:
        render("{{ raise_exception(messages[0].content) }}", [{"role": "user", "content": "\x1b[2J\u00e9\n" * 10_000}])
    assert str(raised.value).isascii() and str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


def test_generation_marks_are_passed_over_as_by_transformers() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    ((expected,), _) = render_jinja_template([MESSAGES], chat_template=source)
    assert render(source) == expected == "<user>Hi"


@pytest.mark.parametrize("name", ["center(300000000)", "batch(300000000, 'x')|list", "wordwrap(1)", "round(99999999)"])
def test_filters_without_a_limit_are_not_there(name: str) -> None:
    with pytest.raises(RequestError, match=r"chat template is broken: No filter named"):
        ChatTemplate(f"{{{{ 'x y'|{name} }}}}", {})


@pytest.mark.parametrize("source", ["{% for %}", "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}"])
def test_a_broken_template_says_so(source: str) -> None:
    with pytest.raises(RequestError, match="the model's chat template is broken"):
        ChatTemplate(source, {})
